"""`inl export`: what transformers loads computes what the checkpoint does, and what cannot be exported is one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner, Result

from inl_cli.app import app
from inl_core.corpus.chat_template import CHAT_TEMPLATE, encode_chat, tokenizer_config
from inl_core.inference.checkpoint_files import MANIFEST, OPTIMIZER, read_config
from inl_core.inference.loading import load_model, load_weights, read_model_config
from inl_core.interop.huggingface import export as exporting
from inl_core.interop.huggingface.llama import why_not_llama
from inl_core.interop.huggingface.tokenizer import convert_tokenizer
from inl_core.model import IntegratorLanguageModel
from tests.inference.foreign import KINDS, WORDS, foreign_tokenizer
from tests.inference.test_commands import assert_refused
from tests.inference.tiny import TEXT, config, reseal, tokenizer, write_checkpoint
from tests.interop.reference_files import random_tensors, write_file

MODELS: dict[str, dict[str, Any]] = {
    "v1": {"preset": "v1"},
    "v2": {"preset": "v2", "integrator": {"mu": {"group_size": 8}}},
    "v3": {"preset": "v3"},
    "v4": {"preset": "v4"},
    "v5": {"preset": "v5"},
    "transformer": {"preset": "transformer"},
    "transport": {"preset": "transformer", "transport": True},
}
LLAMAS: dict[str, dict[str, Any]] = {
    "as the preset has it": {},
    "low rank, untied, biases": {"embedding_rank": 16, "tie_head": False, "bias": True, "rope_theta": 500.0},
    "low rank, tied, not normalised": {"embedding_rank": 16, "embedding_norm": False, "embedding_scale": "sqrt_dim"},
}


def inl(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def random_ids(rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(6, tokenizer().vocab_size, (rows, length), generator=generator)


def alone(own: IntegratorLanguageModel, ids: Tensor) -> Tensor:
    """The logits (S, V) of one text (S,), by the checkpoint's own model without a cache or a batch."""
    with torch.inference_mode():
        return own.logits(own(ids[None]).hidden)[0]


def assert_same_function(own: IntegratorLanguageModel, exported: Any) -> None:
    """The exported model's logits are those of each text alone: in one pass, in pieces with a cache, and padded."""
    ids = random_ids(2, 24)
    wanted = torch.stack([alone(own, row) for row in ids])
    near = {"atol": 1e-5, "rtol": 0.0}
    with torch.inference_mode():
        torch.testing.assert_close(exported(ids).logits, wanted, **near)
        cache, pieces = None, []
        for piece in ids.split([10, 1, 1, 5, 7], dim=1):
            output = exported(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), wanted, **near)

        short, mask = ids.clone(), torch.ones_like(ids)
        short[1], mask[1, :9] = short[1].roll(9), 0
        for use_cache in (True, False):
            padded = exported(short, attention_mask=mask, use_cache=use_cache).logits
            torch.testing.assert_close(padded[0], wanted[0], **near)
            torch.testing.assert_close(padded[1, 9:], wanted[1, :15], **near)
        # The batch goes on with the cache, and its mask with it.
        first = exported(short[:, :20], attention_mask=mask[:, :20], use_cache=True)
        rest = exported(short[:, 20:], attention_mask=mask, past_key_values=first.past_key_values)
        torch.testing.assert_close(rest.logits[1], wanted[1, 11:15], **near)


@pytest.mark.parametrize("name", MODELS)
def test_the_exported_model_computes_what_the_checkpoint_does(tmp_path: Path, name: str) -> None:
    checkpoint, output = write_checkpoint(tmp_path / "run", **MODELS[name]), tmp_path / "out"
    result = inl("export", tmp_path / "run", "--output", output, "--format", "inl", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["format"], found["not_llama"] is None) == ("inl", name == "transformer")
    assert max(found["differences"][way] for way in ("full", "cached", "padded")) < 1e-5

    own = load_model(checkpoint).model
    exported = AutoModelForCausalLM.from_pretrained(output).eval()
    assert (exported.config.bos_token_id, exported.generation_config.eos_token_id) == (0, 1)
    assert_same_function(own, exported)
    ids = random_ids(2, 12)
    texts, loss = exported.generate(ids, max_new_tokens=6, do_sample=False), exported(ids, labels=ids).loss
    for row in range(2):
        for length in range(12, 18):
            assert texts[row, length] == alone(own, texts[row, :length])[-1].argmax()
    assert torch.equal(exported.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False), texts)
    torch.testing.assert_close(loss * 22, own.loss_sum(own(ids[:, :-1]).hidden, ids[:, 1:]), atol=1e-4, rtol=0)

    half = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    wanted = torch.stack([alone(own, row) for row in ids])
    with torch.inference_mode():
        assert float((half(ids).logits - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    assert half.generate(ids, max_new_tokens=3).shape == (2, 15)
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").eval()
    torch.testing.assert_close(again(ids).logits, half(ids).logits, atol=0, rtol=0)


@pytest.mark.parametrize("name", LLAMAS)
def test_a_plain_transformer_becomes_a_llama(tmp_path: Path, name: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", "transformer", **LLAMAS[name])
    result = inl("export", tmp_path / "run", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM" in result.stdout
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_same_function(load_model(checkpoint).model, llama)
    files = list((tmp_path / "out").iterdir())
    others_may_read = (checkpoint / "config.json").stat().st_mode
    assert {file.stat().st_mode for file in files} == {others_may_read}
    assert ".py" not in {file.suffix for file in files}
    # transformers 4, which converters to other formats still use, knows these names alone.
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == llama.config.rope_parameters["rope_theta"] == LLAMAS[name].get("rope_theta", 1e4)
    converted = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert converted["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("preset", "changes", "reason"),
    [
        ("v5", {}, "has transport, momentum, anchor, equilibrium, excitation in its residual stream"),
        ("v4", {}, "has an integrator in each block"),
        ("transformer", {"transport": "embedding"}, "has transport in its residual stream"),
        ("transformer", {"positions": "sinusoidal"}, "has sinusoidal positions"),
        ("transformer", {"norm": "layernorm"}, "has layernorm for its norms"),
        ("transformer", {"feed_forward": "gelu"}, "has a gelu feed-forward"),
    ],
)
def test_what_is_no_llama_says_why(preset: str, changes: dict[str, Any], reason: str) -> None:
    assert why_not_llama(config(preset, **changes)) == reason


def test_the_tokenizer_gives_the_ids_that_the_model_was_trained_with(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", "v5")
    assert inl("export", tmp_path / "run", "--output", tmp_path / "out").exit_code == 0
    own, exported = tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (TEXT, "", " a  b\n\n", "\u00e9\u4e00"):
        ids = exported(text)["input_ids"]
        assert ids == [own.bos_id, *own.encode(text)]
        assert exported.decode(ids, skip_special_tokens=True) == text
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (own.bos_id, own.eos_id, own.bos_id)
    batch = exported(["The quick", "a"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][1].tolist() == sorted(batch["attention_mask"][1].tolist())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    one = exported(["a"], return_tensors="pt")
    both = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert both[1, -5:].tolist() == model.generate(**one, max_new_tokens=5, do_sample=False)[0, -5:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_made_elsewhere_keep_their_ids(tmp_path: Path, kind: str) -> None:
    own = foreign_tokenizer(kind)
    convert_tokenizer(own, max_seq_len=64).save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    for text in (WORDS, "the  town", "", " roofs", "zz\u00fc q"):
        assert exported(text)["input_ids"] == [own.bos_id, *own.encode(text)]
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (own.bos_id, own.eos_id, own.bos_id)


def test_the_chat_template_goes_along_and_answers_end_where_it_ends_them(tmp_path: Path) -> None:
    checkpoint, own = write_checkpoint(tmp_path / "run", "v5"), tokenizer()
    (checkpoint / "tokenizer_config.json").write_text(tokenizer_config(own, CHAT_TEMPLATE))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"]["tokenizer_config.json"] = dict(manifest["files"]["config.json"])
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    reseal(checkpoint)
    assert inl("export", checkpoint, "--output", tmp_path / "out").exit_code == 0
    said = [{"role": role, "content": f"{role} says {TEXT}"} for role in ("system", "user", "assistant", "user")]
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    for asks in (True, False):
        found = exported.apply_chat_template(said, add_generation_prompt=asks, return_dict=True)["input_ids"]
        assert found == encode_chat(own, CHAT_TEMPLATE, said, add_generation_prompt=asks)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [own.eos_id, own.role_id("end")]


def halved(checkpoint: Path) -> None:
    """Divide the weights of a checkpoint as two processes of a sharded run write them, and take its optimizer away."""
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    for part in range(2):
        tensors, begins = {}, {}
        for name, tensor in weights.items():
            middle = (len(tensor) + 1) // 2 if tensor.dim() == 2 else None
            if middle is None and part == 1:
                continue
            rows = slice(None) if middle is None else slice(middle, None) if part else slice(middle)
            tensors[name] = tensor[rows].contiguous() if tensor.dim() else tensor
            begins[name] = {"saved_offsets": [0 if middle is None else part * middle, 0][: tensor.dim()]}
        file = checkpoint / f"shard-{part + 1:05d}-model-00001-of-00001.safetensors"
        save_file(tensors, file, metadata={"DCP_SHARDING_INFO": json.dumps(begins)})
    shutil.rmtree(checkpoint / "training_state")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    entry = manifest["files"].pop("model.safetensors")
    manifest["files"] = {name: one for name, one in manifest["files"].items() if not name.startswith("training_state/")}
    manifest["files"] |= {file.name: dict(entry) for file in checkpoint.glob("shard-*")}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    reseal(checkpoint)


def test_a_divided_checkpoint_is_exported_without_its_optimizer(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole", "v5")
    divided = Path(shutil.copytree(whole, tmp_path / "divided"))
    halved(divided)
    (whole / OPTIMIZER).write_bytes(b"\0" * (whole / OPTIMIZER).stat().st_size)  # nobody reads it
    for name, checkpoint in (("a", whole), ("b", divided)):
        result = inl("export", checkpoint, "--output", tmp_path / name, "--quiet")
        assert result.exit_code == 0, result.output
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]


def test_imported_weights_leave_again_without_a_tokenizer(tmp_path: Path) -> None:
    file = write_file(tmp_path / "model.safetensors", random_tensors("released"))
    made = inl("import-reference", file, "--output", tmp_path / "in", "--num-heads", 4, "--iterations", "1,3,2")
    assert made.exit_code == 0, made.output
    result = inl("export", tmp_path / "in", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "has no tokenizer, so the directory has none" in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "modeling_inl.py"]
    )
    config = read_model_config(tmp_path / "in", read_config(tmp_path / "in"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert exported.config.model == config
    ids = random_ids(1, 9)
    torch.testing.assert_close(exported(ids).logits[0], alone(load_weights(tmp_path / "in", config), ids[0]))


def test_bad_arguments_are_one_line_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "run", "v5")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    assert_refused(
        inl("export", tmp_path / "run", "--output", full), 2, f"{full}: exists and is not an empty directory"
    )
    llama = inl("export", tmp_path / "run", "--output", tmp_path / "out", "--format", "llama")
    assert_refused(llama, 2, "in its residual stream, so it is no Llama; use --format huggingface")

    def scaled(own: IntegratorLanguageModel, exported: Any) -> Any:
        exported.model.norm_final.weight.data *= 1.01
        return compare(own, exported)

    compare = exporting.compare_logits
    monkeypatch.setattr(exporting, "compare_logits", scaled)
    assert_refused(inl("export", tmp_path / "run", "--output", tmp_path / "out"), 1, "differ from the checkpoint's by")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(inl("export", tmp_path / "run", "--output", tmp_path / "out"), 2, 'pip install "inl[hf]"')


def test_of_two_exports_to_one_place_the_slower_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "run", "transformer")
    command = ("export", tmp_path / "run", "--output", tmp_path / "out")
    compare, codes = exporting.compare_logits, []

    def while_another_exports(own: IntegratorLanguageModel, exported: Any) -> Any:
        monkeypatch.setattr(exporting, "compare_logits", compare)
        codes.append(inl(*command).exit_code)
        return compare(own, exported)

    monkeypatch.setattr(exporting, "compare_logits", while_another_exports)
    assert_refused(inl(*command), 2, "out: exists and is not an empty directory")
    assert codes == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "run").stat().st_mode
    LlamaForCausalLM.from_pretrained(tmp_path / "out")


REMOTE = """
import sys
class Hidden:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "inl_core":
            raise ModuleNotFoundError(f"No module named {name!r}")
if sys.argv[2] == "hidden":
    sys.meta_path.insert(0, Hidden())
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    sys.exit(f"{error}")
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[1] + "-again")
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "-again", trust_remote_code=True)).__name__)
"""


@pytest.mark.slow
def test_where_only_transformers_is_imported_remote_code_finds_inl_or_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "run", "v5")
    assert inl("export", tmp_path / "run", "--output", tmp_path / "out").exit_code == 0
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    script = [sys.executable, "-c", REMOTE, str(tmp_path / "out")]
    found = subprocess.run([*script, "seen"], capture_output=True, text=True, check=False)
    assert found.stdout == "InlForCausalLM\n", found.stderr
    missing = subprocess.run([*script, "hidden"], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].endswith('pip install "inl[hf]"')
