"""What is wrong with a recipe is told: its line, its key, its value, what is expected, and the nearest name."""

import os
from pathlib import Path

import pytest

from inl_core.errors import RecipeError
from inl_core.recipe.load import load_recipe, recipe_from_mapping

MINIMAL = "name: x\ntraining:\n  steps: 10\n"

ADDED_TO_MINIMAL = [
    # unknown keys, at every depth
    ("modle:\n  d_model: 64\n", "4 modle: unknown key; did you mean 'model'?"),
    ("model:\n  d_modl: 64\n", "5 model.d_modl: unknown key; did you mean 'd_model'?"),
    (
        "model:\n  preset: v4\n  integrator:\n    iteratons: 3\n",
        "7 model.integrator.iteratons: unknown key; did you mean 'num_iterations'?",
    ),
    (
        "model:\n  preset: v4\n  integrator:\n    mu:\n      fom: fixed\n",
        "8 model.integrator.mu.fom: unknown key; did you mean 'form'?",
    ),
    # a key that lives elsewhere in the tree
    (
        "model:\n  learning_rate: 1e-3\n",
        "5 model.learning_rate: unknown key; did you mean 'training.optimizer.learning_rate'?",
    ),
    (
        "  learning_rat: 1e-3\n",
        "4 training.learning_rat: unknown key; did you mean 'training.optimizer.learning_rate'?",
    ),
    (
        "model:\n  excitation:\n    amplitude: 4\n",
        "5 model.excitation: unknown key; did you mean 'model.integrator.excitation' or 'model.stream.excitation'?",
    ),
    ("model:\n  mu:\n    zzzz: 1\n", "5 model.mu: unknown key; did you mean 'model.integrator.mu'?"),
    (
        "  cycle:\n    qqqq: 1\n",
        "5 training.cycle.qqqq: unknown key; the keys here are preset, equilibrium, exploration, num_cycles, "
        "warmup_epochs, steps_per_epoch",
    ),
    # storage that is not mounted
    ("data:\n  sources: ['gs://b/x']\n", "5 data.sources.0: gs://b/x: a URL; only paths of this machine"),
    ("data:\n  directory: s3://b/x\n", "5 data.directory: s3://b/x: a URL; only paths of this machine"),
    ("data:\n  tokenizer:\n    file: memory://x\n", "6 data.tokenizer.file: memory://x: a URL; only paths of this"),
    # wrong types: nothing is converted
    ("  seed: abc\n", "4 training.seed: expected a whole number, got 'abc'"),
    ('  seed: "2"\n', "4 training.seed: expected a whole number, got '2' (text: remove the quotes)"),
    ("  seed: true\n", "4 training.seed: expected a whole number, got true"),
    ("  seed: 1.5\n", "4 training.seed: expected a whole number, got 1.5"),
    ("  seed: null\n", "4 training.seed: expected a whole number, got null"),
    ('  gradient_clip: "1"\n', "4 training.gradient_clip: expected a number, got '1' (text: remove the quotes)"),
    ("  gradient_clip: .nan\n", "4 training.gradient_clip: expected a finite number, got NaN"),
    ("  compile: yes\n", "4 training.compile: expected true or false, got 'yes'"),
    ("  compile: 1\n", "4 training.compile: expected true or false, got 1"),
    ("  losses: 3\n", "4 training.losses: expected a section, got 3; its keys are lambda_mean, "),
    ("  losses:\n", "4 training.losses: empty; its keys are lambda_mean, "),
    (
        "data:\n  sources: builtin:python\n",
        "5 data.sources: expected a list, got 'builtin:python'; write [builtin:python]",
    ),
    ("data:\n  sources: []\n", "4 data: sources is empty: name a file, "),
    ("  optimizer:\n    betas: [0.9]\n", "5 training.optimizer.betas.1: missing: the list is too short"),
    (
        "  optimizer:\n    betas: [0.9, 0.95, 0.99]\n",
        "5 training.optimizer.betas: expected at most 2 values, got [0.9, 0.95, 0.99]",
    ),
    (
        "  optimizer:\n    betas:\n      - 0.9\n      - 1.5\n",
        "7 training.optimizer.betas.1: expected a number less than 1.0, got 1.5",
    ),
    # numbers out of range, and words that are not among the choices
    ("model:\n  d_model: -1\n", "5 model.d_model: expected a number greater than 0, got -1"),
    (
        "model:\n  preset: v6\n",
        "5 model.preset: expected 'v1', 'v2', 'v3', 'v4', 'v5' or 'transformer', got 'v6'; did you mean 'v5'?",
    ),
    (
        "model:\n  embedding_rank: autoo\n",
        "5 model.embedding_rank: expected a whole number or 'auto', got 'autoo'; did you mean 'auto'?",
    ),
    (
        "model:\n  transport: everywhere\n",
        "5 model.transport: expected true, false, 'embedding', 'attention' or 'feed_forward', got 'everywhere'",
    ),
    # values that do not fit together: the message names their section
    (
        "  micro_batch_size: 5\n",
        "2 training: batch_tokens 2048 = 16 sequences of 128; micro_batch_size 5 x world size 1 = 5 does not divide 16",
    ),
    ("model:\n  num_heads: 3\n", "4 model: num_heads 3 must divide d_model 128"),
    ("model:\n  preset: transformer\n  integrator:\n    dt: 1\n", "4 model: the transformer preset has no integrator"),
    (
        "model:\n  integrator:\n    dt: 1\n",
        "4 model: the v5 preset, the default, has no integrator inside its blocks (its depth is the integrator's "
        "time): set preset: v4 (or v1, v2, v3), or remove the integrator section",
    ),
    (
        "  cycle: {preset: balanced}\n",
        "1: training.cycle drives an integrator and this model has no integrator inside its blocks (its depth is the "
        "integrator's time): remove it",
    ),
    ("  losses: {lambda_mean: 1.0}\n", "1: training.losses act on integrator states and this model has no integrator"),
    ("  losses: {lambda_mean_final: 0.1}\n", "1: training.losses act on integrator states and this model has no"),
    ("  recomputation: integrator\n", "1: training.recomputation integrator: this model has no integrator inside its"),
    ("  min_iterations: 1\n", "1: training.min_iterations: this model has no integrator inside its blocks (its depth"),
    ("  sequence_length: 2048\n", "1: training.sequence_length 2048 exceeds model.max_seq_len 1024"),
    (
        "  min_iterations: 3\nmodel:\n  preset: v4\n",
        "1: training.min_iterations 3 exceeds a layer's num_iterations 2; lower it",
    ),
    (
        "  min_iterations: 1\nmodel:\n  preset: v3\n",
        "1: training.min_iterations: the budget sets the iterations; use budget.strategy uniform",
    ),
    (
        "  min_iterations: 1\nmodel:\n  preset: transformer\n",
        "1: training.min_iterations: this model has no integrator; remove it",
    ),
    # text that is not YAML
    ("  seed: [1\n", "5: not valid YAML: expected ',' or ']'"),
    ("  seed: 1\n  seed: 2\n", "5 training.seed: given twice, first in line 4"),
    ("data: &a\n  sources: [*a]\n", "4 data.sources.0: an alias contains itself"),
    (
        "name2: !!python/object:os.system {}\n",
        "4 name2: tag 'tag:yaml.org,2002:python/object:os.system' means nothing here; write a plain value",
    ),
    # YAML that no recipe would hold
    ("  seed: !!int abc\n", "4 training.seed: 'abc' is tagged int and is none"),
    ("  seed: !!float abc\n", "4 training.seed: 'abc' is tagged float and is none"),
    ("  seed: !!bool abc\n", "4 training.seed: 'abc' is tagged bool and is none"),
    ("  seed: !!timestamp 2020-01-01\n", "4 training.seed: tag 'tag:yaml.org,2002:timestamp' means nothing"),
    ("  seed: !!binary aGVsbG8=\n", "4 training.seed: tag 'tag:yaml.org,2002:binary' means nothing here"),
    ("  losses: !!set {a, b}\n", "4 training.losses: tag 'tag:yaml.org,2002:set' means nothing here"),
    ("  seed: !mine 3\n", "4 training.seed: tag '!mine' means nothing here"),
    ("!!binary name: x\n", "4: a key must be a plain word"),
    ("  seed: 2020-01-01\n", "4 training.seed: expected a whole number, got '2020-01-01'"),
    (f"  seed: {'9' * 5000}\n", "4 training.seed: a number of 5,000 digits; no key takes that many"),
    (f"  gradient_clip: 0.{'9' * 5000}\n", "4 training.gradient_clip: a number of 5,002 digits"),
    ("  gradient_clip: 1e400\n", "4 training.gradient_clip: expected a finite number, got Infinity"),
    ('  device: "\\ud800"\n', "4 training.device: half of a surrogate pair is no character"),
    ('  "\\ud800": 1\n', "4 training: half of a surrogate pair is no character"),
    ('  device: "\\UFFFFFFFF"\n', ""),
    ("  device: a\0b\n", ""),
    ("  1: 2\n", "4 training.1: unknown key"),
    (f"  {'k' * 900}: 2\n", "4 training.kkk"),
    (
        "model:\n  preset: v4\n  integrator:\n    backend: foo\n",
        "6 model.integrator: backend 'foo': this key is not used any more (training.operations chooses); remove it",
    ),
    (
        "model:\n  size: 13b\n",
        "4 model: size '13b' is not one of small, medium, large, xlarge, 3B, 7B, 13B, 3072x32, 2B, 2.2B, 5B, 10B; "
        "did you mean '13B'?",
    ),
    ("model:\n  size: [1]\n", "5 model.size: expected text, got [1]"),
    (f"  seed: {'[' * 100_000}\n", "4: not valid YAML: more than 50 levels deep, or more than 20,000 values"),
    (f"  seed: {'[a, ' * 10}{'b, ' * 20_001}\n", "4: not valid YAML: more than 50 levels deep, or more than"),
    (f"  seed: [{'*a, ' * 3}]\n", "4: not valid YAML: found undefined alias"),
    # paths
    ("data:\n  directory: ''\n", "5 data.directory: an empty path would be the working directory"),
    ('data:\n  directory: "a\\0b"\n', "5 data.directory: no file name holds a NUL character"),
    ("data:\n  sources: [~no-such-user/x]\n", "5 data.sources.0: ~no-such-user/x: no home directory is known"),
]
BAD_FILES = [
    *((MINIMAL + added, message) for added, message in ADDED_TO_MINIMAL),
    (
        "name: x\ntraining:\n  steps: 10\n  cycle:\n    equilibrium:\n      duration: 3\n",
        "6 training.cycle.equilibrium.duration: unknown key; did you mean 'duration_epochs'?",
    ),
    ("name: 1e3\ntraining:\n  steps: 10\n", "1 name: expected text, got 1000 (text goes in quotes)"),
    ("name: a/b\ntraining:\n  steps: 10\n", "1 name: expected text that matches "),
    # keys that are missing
    ("training:\n  steps: 10\n", "1 name: missing; it is required (Names the run directory, runs/NAME.)"),
    ("name: x\n", "1 training: missing; its keys are steps, "),
    # values that do not fit together: the message names their section
    (
        "name: x\ntraining:\n  steps: 10\n  batch_tokens: 2000\n",
        "2 training: batch_tokens 2000 is not a multiple of sequence_length 128: 2000 / 128 = 15.62; "
        "try batch_tokens 1920",
    ),
    ("name: x\ntraining:\n  seed: 1\n", "2 training: give exactly one of steps and tokens"),
    ("name: x\n\ttraining: 1\n", "2: not valid YAML: found character '\\t' that cannot start any token"),
    ("- a\n- b\n", '1: a recipe is a mapping of keys, got ["a", "b"]'),
    ("hello\n", "1: a recipe is a mapping of keys, got 'hello'"),
    ("name: x\n---\nname: y\n", "2: not valid YAML: but found another document"),
    ("? [a, b]\n: 1\n", "1: a key must be a plain word"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_each_problem_names_line_path_value_and_fix(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    expected = f"{path}:{message}"
    assert str(error.value)[: len(expected)] == expected
    assert "\n" not in str(error.value)


def test_aliases_that_stand_for_a_billion_values_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    lines = [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]" for i in range(1, 10)]
    path.write_text("\n".join([MINIMAL + "k0: &k0 [x, x]", *lines]), encoding="utf-8")
    with pytest.raises(RecipeError, match="aliases make more than 50 levels, or more than 20,000 values"):
        load_recipe(path)


def test_a_recipe_full_of_problems_tells_the_first_of_them(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(MINIMAL + "".join(f"k{number}: 1\n" for number in range(1000)), encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    lines = str(error.value).split("\n")
    assert len(lines) == 31
    assert lines[-1] == f"{path}: 1,000 problems in all"


def test_an_override_is_shown_short() -> None:
    with pytest.raises(RecipeError) as error:
        recipe_from_mapping({"name": "x", "training": {"steps": 1}}, [f"training.{'x' * 10**6}={'y' * 10**5}"])
    assert len(str(error.value)) < 1000


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text(
        MINIMAL + "data:\n  directory: ~/d\n  sources: [~/s, a~]\n  tokenizer:\n    file: ~/t\n", encoding="utf-8"
    )
    data = load_recipe("~/a.yaml").data
    assert (data.directory, data.tokenizer.file) == (tmp_path / "d", tmp_path / "t")
    assert data.sources == (str(tmp_path / "s"), "a~")
    assert load_recipe("~/a.yaml", ["data.directory=~/other"]).data.directory == tmp_path / "other"


def test_a_recipe_is_read_from_a_pipe_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inl_core.files._LONGEST_SILENCE", 0)
    reader, writer = os.pipe()
    os.write(writer, MINIMAL.encode())
    os.close(writer)
    assert load_recipe(f"/dev/fd/{reader}").training.steps == 10
    os.close(reader)
    os.mkfifo(tmp_path / "silent")
    with pytest.raises(RecipeError, match="silent: a FIFO to which nobody wrote"):
        load_recipe(tmp_path / "silent")
    with pytest.raises(RecipeError, match="/dev/zero: a device, not a file"):
        load_recipe("/dev/zero")
    (tmp_path / "large").write_bytes(b"#" * (2 << 20))
    with pytest.raises(RecipeError, match="large: larger than 1,048,576 bytes"):
        load_recipe(tmp_path / "large")


BAD_OVERRIDES = [
    ("training.stepss=3", "--set training.stepss=3: unknown key; did you mean 'steps'?"),
    ("trainig.steps=3", "--set trainig.steps=3: unknown key; did you mean 'training'?"),
    ("model.seed=3", "--set model.seed=3: unknown key; did you mean 'training.seed'?"),
    ("model.d_model=abc", "--set model.d_model=abc: expected a whole number, got 'abc'"),
    ("model.d_model.x=3", "--set model.d_model.x=3: model.d_model is a value, not a section, so it has no 'x'"),
    ("model.d_model", "--set model.d_model: expected KEY=VALUE, for example --set training.steps=100"),
    ("training.steps=", "--set training.steps=: no value (a shell variable that is not set?); write training.st"),
    ("=3", "--set =3: expected KEY=VALUE"),
    ("a..b=3", "--set a..b=3: expected KEY=VALUE"),
    ("data.sources=[a", "--set data.sources=[a:1: not valid YAML: expected ',' or ']'"),
    ("training.schedule={nme: 3}", "--set training.schedule={nme: 3} training.schedule.nme: unknown key; did you mean"),
    ("training.losses=3", "--set training.losses=3: expected a section, got 3; its keys are "),
    (
        "training.batch_tokens=1000",
        "a.yaml:2 (with --set training.batch_tokens=1000) training: batch_tokens 1000 is not a multiple of",
    ),
]


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES)
def test_a_problem_with_an_override_names_the_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(MINIMAL, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_recipe("a.yaml", [override])
    assert str(error.value)[: len(message)] == message


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: x\ntraining:\n  stps: 10\n  seed: x\nmodel:\n  d_model: 1.5\ndata:\n  vocab_size: 3\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).splitlines() == [
        f"{path}:3 training.stps: unknown key; did you mean 'steps'?",
        f"{path}:4 training.seed: expected a whole number, got 'x'",
        f"{path}:6 model.d_model: expected a whole number, got 1.5",
        f"{path}:8 data.vocab_size: unknown key; did you mean 'data.tokenizer.vocab_size'?",
    ]


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"tinny\.yaml: no such file; did you mean '.*/tiny\.yaml'\?"):
        load_recipe(tmp_path / "tinny.yaml")
    with pytest.raises(RecipeError, match=r"tiny: no such file; did you mean '.*/tiny\.yaml'\?"):
        load_recipe(tmp_path / "tiny")


def test_a_shipped_recipe_is_named_from_anywhere(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such file; did you mean 'medium'\?"):
        load_recipe(tmp_path / "recipes" / "medium.yaml")


def test_a_directory_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"is a directory, not a recipe; it holds b\.yaml"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the recipe is empty"),
        (b"# only a comment\n", "the recipe is empty"),
        (b"name: \xff\n", "not UTF-8 text"),
        (b"name: a\x00b\n", "not valid YAML: special characters are not allowed"),
    ],
)
def test_a_file_that_holds_no_recipe_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_a_mapping_is_validated_under_its_own_name() -> None:
    with pytest.raises(RecipeError, match=r"^config\.json training\.stps: unknown key; did you mean 'steps'\?$"):
        recipe_from_mapping({"name": "x", "training": {"stps": 10}}, source="config.json")
