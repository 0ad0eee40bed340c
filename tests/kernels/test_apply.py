"""Which operations are put into a model, what is said of them, and that the model computes the same with them."""

from unittest.mock import patch

import pytest
import torch

from inl_core.kernels import Choice, apply, choose, describe, measuring, put
from inl_core.kernels.attention import CppAttention, DocumentStarts
from inl_core.kernels.integrator import CppDynamics
from inl_core.kernels.loss import ChunkedLoss, OwnLoss, SharedLookup
from inl_core.model import IntegratorLanguageModel
from inl_core.model.attention import InnerAttention, Visibility
from inl_core.model.dynamics import Dynamics
from inl_core.model.embedding import Lookup
from inl_core.model.mixture import MixedDynamics
from tests.kernels.native import (
    PRODUCTS,
    OwnOperations,
    assert_alike,
    build_model,
    losses_and_gradients,
    needs_library,
    put_own,
    some_ids,
    without_library,
)

PRESETS = ("v1", "v2", "v3", "v4", "v5", "transformer")
CPU = torch.device("cpu")
OWN = Choice("C++ with MKL", "said by a test")


@pytest.fixture
def fastest_is_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which C++ is the fastest."""
    monkeypatch.setattr(measuring, "fastest", lambda *_: OWN)


def parts(model: IntegratorLanguageModel) -> set[type]:
    """The kinds of all the parts that may be replaced."""
    found = {type(model.visibility), type(model.vocabulary_loss), type(model.embedding.lookup)}
    found |= {type(block.attention.inner_attention) for block in model.blocks}
    return found | {type(integrator.dynamics) for integrator in model.integrators()}


TORCH_PARTS = {Visibility, ChunkedLoss, Lookup, InnerAttention, Dynamics}
OWN_PARTS = {DocumentStarts, OwnLoss, SharedLookup, CppAttention, CppDynamics}


@needs_library
@pytest.mark.usefixtures("fastest_is_own")
def test_what_is_applied_last_is_what_is_there():
    model = build_model("v4")
    for operations, expected in (("auto", OWN_PARTS), ("plain", TORCH_PARTS), ("auto", OWN_PARTS)):
        apply(model, operations=operations)
        assert parts(model) == expected


@pytest.mark.usefixtures("fastest_is_own")
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"operations": "plain"}, "training.operations is plain"),
        ({"bf16": True}, "those of our own are for single or double precision"),
        ({"device": torch.device("meta")}, "those of our own are for CPUs"),
    ],
)
def test_where_our_own_cannot_or_must_not_run_torch_does_everything_and_the_reason_is_said(how, reason):
    found = choose(build_model("v4").config, how.pop("device", CPU), **how)
    assert found == {part: Choice("torch", reason) for part in ("attention", "integrator", "loss")}
    assert describe(found) == f"attention, integrator, loss by torch ({reason})"


def test_without_a_library_the_loss_alone_is_our_own():
    with without_library():
        model = build_model("v4")
        found = apply(model)
    assert found["attention"] == found["integrator"] == ("torch", "no operations in C++: this torch has no MKL")
    assert found["loss"].way == "inl's chunks"
    assert parts(model) == {Visibility, OwnLoss, SharedLookup, InnerAttention, Dynamics}


@pytest.mark.usefixtures("fastest_is_own")
def test_the_experts_of_a_mixture_are_run_by_the_plain_loop():
    model = build_model("v4", integrator={"controller": {"experts": 2}})
    choice, on_gpu = (choose(model.config, torch.device(device))["integrator"] for device in ("cpu", "cuda"))
    assert choice == ("torch", "the experts of a mixture are run one by one")
    put(model, {"attention": Choice("torch", ""), "integrator": choice, "loss": Choice("torch", "")})
    assert {type(integrator.dynamics) for integrator in model.integrators()} == {MixedDynamics}
    put(model, {"attention": Choice("torch", ""), "integrator": OWN, "loss": Choice("torch", "")})
    assert {type(integrator.dynamics) for integrator in model.integrators()} == {MixedDynamics}
    expected = losses_and_gradients(model, some_ids())
    put(model, {"attention": Choice("torch", ""), "integrator": on_gpu, "loss": Choice("torch", "")})
    assert all(integrator.router.takes_every_token for integrator in model.integrators())
    assert_alike(losses_and_gradients(model, some_ids()), expected)


@pytest.mark.usefixtures("fastest_is_own")
def test_a_transformer_has_no_integrator_to_choose_for():
    assert set(choose(build_model("transformer").config, CPU)) == {"attention", "loss"}


@pytest.mark.usefixtures("fastest_is_own")
def test_a_plan_says_each_way_once_and_why():
    text = describe(choose(build_model("v4").config, CPU))
    assert text.startswith(f"attention, integrator by {OWN.way} ({OWN.why}); loss by inl's chunks (less memory")


def test_a_head_of_its_own_shares_no_table():
    model = build_model("v4", tie_head=False)
    with patch.object(measuring, "fastest", lambda *_: Choice("torch", "")):
        apply(model)
    assert type(model.embedding.lookup) is Lookup
    assert type(model.vocabulary_loss) is OwnLoss


@needs_library
@pytest.mark.parametrize("preset", PRESETS)
def test_a_state_dict_does_not_know_of_operations(preset):
    model = build_model(preset)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    put_own(model)
    assert list(model.state_dict()) == list(before)
    assert list(dict(model.named_parameters())) == [name for name, _ in build_model(preset).named_parameters()]
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    build_model(preset).load_state_dict(model.state_dict())


VARIANTS = {
    **{preset: {"preset": preset} for preset in PRESETS},
    "learned budget": {"preset": "v4", "integrator": {"num_iterations": 3, "budget": {"strategy": "learned"}}},
    "own controller, channels": {
        "preset": "v4",
        "integrator": {"controller": {"shared": False, "modulation": "channel", "activation": "tanh"}},
    },
    "no candidate, no beta_max": {"preset": "v4", "integrator": {"candidate": "none", "beta_max": None}},
    "plain alpha, sparse, velocity starts anew": {
        "preset": "v4",
        "integrator": {"dynamic_alpha": False, "carry_velocity": False, "excitation": {"sparsity": 0.4}},
    },
    "low rank, biased, sinusoidal": {"preset": "v4", "embedding_rank": 8, "bias": True, "positions": "sinusoidal"},
    "experts": {"preset": "v4", "integrator": {"controller": {"experts": 2}}},
    "own head": {"preset": "v4", "tie_head": False},
}


@needs_library
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_model_computes_the_same_with_our_own_operations(changes, product):
    model, ids = build_model(**changes), some_ids()
    plain = losses_and_gradients(model, ids)
    with OwnOperations() as ran:
        found = losses_and_gradients(put_own(model, product), ids)
    assert ("integrator" in ran.found) == (bool(model.integrators()) and "experts" not in str(changes))
    assert "attention_backward" in ran.found
    assert_alike(found, plain, rtol=2e-4, atol=2e-5)


@needs_library
def test_an_evaluation_that_stops_early_or_records_is_the_plain_one():
    from inl_core.model import Options

    model = build_model(
        "v4", integrator={"early_stopping": {"convergence_threshold": 0.05}, "num_iterations": 5}
    ).eval()
    ids = some_ids()
    with torch.no_grad():
        plain = model(ids, options=Options(keep_trajectory=True))
        with OwnOperations() as ran:
            found = put_own(model)(ids, options=Options(keep_trajectory=True))
    assert "integrator" not in ran.found
    torch.testing.assert_close(found.hidden, plain.hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.layers[0].trajectory.alpha, plain.layers[0].trajectory.alpha, rtol=1e-4, atol=1e-5)


def test_an_operation_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'eager': must be one of auto, plain"):
        apply(build_model("v4"), operations="eager")  # type: ignore[arg-type]


@needs_library
@pytest.mark.usefixtures("fastest_is_own")
def test_documents_that_are_the_same_in_every_row_may_be_given_once():
    model, ids = build_model("v4"), torch.arange(40).view(2, 20) % 12
    documents = (torch.arange(20) // 7)[None]
    before = model(ids, document_ids=documents).hidden
    apply(model)
    torch.testing.assert_close(model(ids, document_ids=documents).hidden, before, rtol=1e-4, atol=1e-5)
