"""What a text spells: one grammar of numbers, and one of nothing, at every door."""

from __future__ import annotations

import json

import pytest

from dpo_kit import cli, config, sweep
from dpo_kit.config import scalars
from dpo_kit.errors import ConfigError
from tests.config.test_config import SMALL, problems, small, write
from tests.config.test_config_parameters import notebook, papermill_file, refused

# Spelling -> what YAML 1.1, Python or C read it as; the first is what Python's int() or float() makes of it.
ODD = {
    "010": "10 or 8",
    "0123": "123 or 83",
    "-010": "-10 or -8",
    "08": "8",
    "00": "0",
    "00.5": "0.5",
    "0x10": "16",
    "0b11": "3",
    "0o17": "15",
    "1_000": "1000",
    "1__0": "10",
    "1_0.5": "10.5",
    "1:30": "90",
    "1:30.5": "90.5",
    "١٢": "12",
    "１２": "12",
}  # fmt: skip
PLAIN = {
    "8": 8,
    "0": 0,
    "-0": 0,
    "+5": 5,
    "5.": 5.0,
    ".5": 0.5,
    "-.5": -0.5,
    "1.0": 1.0,
    "5e-6": 5e-6,
    "5e-06": 5e-6,
    "1E5": 1e5,
    "1.5e+3": 1500.0,
    " 5 ": 5,
    "0e-400": 0.0,
    "5e-324": 5e-324,
}
TINY = ("1e-400", "1.0e-400", "-1e-999", "0.0000001e-320", "0." + "0" * 400 + "1")
NO_NUMBERS = ("", "x", "1,5", "1 000", "5 6", "--5", "0b", "0x", "1:99", "1.2.3", "½", "5e", "e5", ".")


@pytest.mark.parametrize("text", PLAIN)
def test_plain_decimals_are_numbers(text):
    number = scalars.decimal(text)
    assert number == PLAIN[text]
    assert type(number) is type(PLAIN[text])
    assert scalars.parse_scalar(text) == number


@pytest.mark.parametrize("text", [*ODD, *TINY, *NO_NUMBERS])
def test_nothing_else_is(text):
    assert scalars.decimal(text) is None


def test_a_number_of_more_digits_than_python_reads_is_no_traceback():
    assert "seed = '999" in (line := problems(seed="9" * 6000)[0])
    assert "is not a finite number" in line


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_no_reader_takes_for_a_number_is_text(text):
    assert scalars.readings(text) == []


# --- numbers at every door -------------------------------------------------------------------------------


def through_file(tmp_path, text):
    """A params file with the spelling as it stands, read by `--config`."""
    tree = json.dumps({**SMALL, "ref": {"path": "tiny-random"}})
    path = write(tmp_path, tree.removesuffix("}") + f', "saver": {{"freq_secs": {text}}}}}')
    return lambda: config.load(path)


DOORS = {
    "file": through_file,
    "override": lambda _, text: lambda: small(f"saver.freq_secs={text}"),
    "section override": lambda _, text: lambda: small(f"saver={{freq_secs: {text}}}"),
    "papermill -r": lambda _, text: lambda: notebook(overrides=[f"saver.freq_secs={text}"]),
    "papermill -p, a section as text": lambda _, text: lambda: notebook(saver=f"{{freq_secs: {text}}}"),
    "a value": lambda _, text: lambda: small(saver={"freq_secs": text}),
    "overrides as text": lambda _, text: lambda: notebook(overrides=f"['saver.freq_secs={text}']"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("text", ODD)
def test_an_odd_number_is_refused_at_every_door_with_the_decimal_to_write(tmp_path, door, text):
    with pytest.raises(ConfigError) as caught:
        DOORS[door](tmp_path, text)()
    fitting = " or ".join(n for n in ODD[text].split(" or ") if float(n) > 0)
    told = f"write {fitting}" if fitting else "give a number greater than 0 or null"
    (line,) = caught.value.problems
    assert line == f"saver.freq_secs = {text!r} is no plain decimal number; {told}"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("text", TINY)
def test_a_number_too_small_for_a_computer_is_not_taken_for_0(tmp_path, door, text):
    with pytest.raises(ConfigError) as caught:
        DOORS[door](tmp_path, text)()
    (line,) = caught.value.problems
    assert "is so small that it would be read as 0; give a number greater than 0" in line


def test_odd_numbers_of_whole_number_fields_and_of_short_names():
    assert problems(["train_dataset.batch_size=010"]) == [
        "train_dataset.batch_size = '010' is no plain decimal number; write 10 or 8"
    ]
    assert problems(["seed=1_0.5"]) == [
        "seed = '1_0.5' is no plain decimal number; give a whole number at least 0 and at most 4294967295"
    ]
    assert refused(max_steps="010", beta="1e-400", lr="0x10", seed="0123") == [
        "seed = '0123' is no plain decimal number; write 123 or 83",
        "total_train_steps = '010' is no plain decimal number; write 10 or 8",
        "actor.beta = '1e-400' is so small that it would be read as 0; give a number greater than 0 "
        "(typically 0.05 to 0.5)",
        "actor.optimizer.lr = '0x10' is no plain decimal number; write 16",
    ]


@pytest.mark.parametrize("text", [*ODD, *PLAIN, *TINY, "1e5", "1:30:00", "yes", "~", "None", "2024-01-01"])
@pytest.mark.parametrize("key", ["freq_secs", "best", "name"])
def test_no_file_means_one_thing_to_config_and_another_to_papermill(tmp_path, key, text):
    """papermill reads the YAML of -f itself: `010` arrives as 8. So `--config` takes no such file."""
    section = '"train_dataset"' if key == "name" else '"saver"'
    tree = {**SMALL, "valid_dataset": {"path": "sample"}}
    if key == "name":
        del tree["train_dataset"]
    body = json.dumps(tree).removesuffix("}") + f', {section}: {{"path": "sample", "{key}": {text}}}}}'
    path = write(tmp_path, body if key == "name" else body.replace('{"path": "sample", "' + key, '{"' + key))
    outcomes = []
    for read in (lambda: config.load(path), lambda: notebook(**papermill_file(path))[0]):
        try:
            outcomes.append(read())
        except ConfigError as error:
            outcomes.append(str(error))
    ours, papermills = outcomes
    assert isinstance(ours, str) or isinstance(papermills, str) or ours == papermills


def test_what_papermill_itself_makes_of_odd_numbers():
    """What cannot be seen: -p and -f hand over the number that papermill read. The first lines then print it."""
    cli_of_papermill = pytest.importorskip("papermill.cli")
    read = cli_of_papermill._resolve_type
    assert {text: read(text) for text in ("010", "1_000", "١٢", "1e-400")} == {
        "010": 10, "1_000": 1000, "١٢": 12, "1e-400": 0.0,
    }  # fmt: skip
    assert {text: read(text) for text in ("0x10", "1:30", "0b11")} == {
        "0x10": "0x10", "1:30": "1:30", "0b11": "0b11",
    }  # fmt: skip
    assert "seed = 10 (from seed)" in notebook(seed=read("010"))[1]


@pytest.mark.parametrize("name", ["001", "0x1f", "1:30", "1_000", "0o17", "٣", "+5", ".5"])
def test_odd_numbers_stay_text_in_a_text_field_and_in_the_resolved_yaml(tmp_path, name):
    c = small(f"trial_name={name}") if name[0] != "." else small(f"train_dataset.name={name}")
    assert name in (c.trial_name, c.train_dataset.name)
    assert config.load(write(tmp_path, config.to_yaml(c))) == c


def test_odd_numbers_in_the_lists_of_notebooks_and_in_grids(tmp_path):
    for value in ("[0.05, 1_0]", ["0.05", "1_0"]):
        with pytest.raises(ConfigError, match=r"betas = .*: '1_0' is no plain decimal number; write 10$"):
            config.read_list("betas", value, float)
    with pytest.raises(ConfigError, match=r"seeds = '010': '010' is no plain decimal number; write 10 or 8$"):
        config.read_list("seeds", "010", int)
    fixed, grid = sweep.split_overrides(["seed=1,010", "actor.beta=0.1,1e-400"])
    with pytest.raises(ConfigError) as caught:
        sweep.expand(lambda extra: small(*fixed, *extra), grid)
    assert "seed = '010' is no plain decimal number; write 10 or 8" in caught.value.problems
    assert any("actor.beta = '1e-400' is so small" in line for line in caught.value.problems)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fork", "x", "--step", "010"], "argument --step: '010' is no plain decimal number; write 10 or 8"),
        (["fork", "x", "--step", "1_0"], "argument --step: '1_0' is no plain decimal number; write 10"),
        (["fork", "x", "--step", "١٢"], "argument --step: '١٢' is no plain decimal number; write 12"),
        (["fork", "x", "--step", "four"], "argument --step: 'four' is text; give a whole number at least 0"),
        (["prune", "--keep", "1_0"], "argument --keep: '1_0' is no plain decimal number; write 10"),
        (["prune", "--keep=-1"], "argument --keep: '-1' is out of range; give a whole number at least 0"),
    ],
)
def test_options_that_are_numbers_take_the_same_grammar(capsys, arguments, message):
    assert cli.main(["runs", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", ["d08", "d8t01", "d00"])
def test_sizes_of_a_backend_have_no_leading_zeros(size):
    (line,) = problems([f"actor.backend=fsdp:{size}"])
    assert f"actor.backend = 'fsdp:{size}' is wrong: " in line
    assert "has a leading zero; write" in line


@pytest.mark.parametrize("word", ["yes", "on", "true", "True", "TRUE", "Yes"])
def test_the_words_of_yaml_for_true_are_one_thing_at_every_door(tmp_path, word):
    tree = json.dumps({**SMALL, "valid_dataset": {"path": "sample"}})
    path = write(tmp_path, tree.removesuffix("}") + f', "saver": {{"best": {word}}}}}')
    for c in (
        config.load(path),
        notebook(**papermill_file(path))[0],
        notebook(overrides=[f"saver.best={word}", "valid_dataset.path=sample"])[0],
        small(saver={"best": word}, valid_dataset={"path": "sample"}),
    ):
        assert c.saver.best is True


@pytest.mark.parametrize("word", ["y", "n", "1", "0", "01", "tRue"])
def test_other_words_are_no_booleans(word):
    (line,) = problems([f"saver.best={word}"])
    assert line.endswith("; give true or false")


# --- nothing ---------------------------------------------------------------------------------------------

NOTHING = ("null", "Null", "NULL", "~", "None", " null ")


@pytest.mark.parametrize("word", NOTHING)
def test_nothing_as_an_override_is_null(word):
    held = {"valid_dataset": {"path": "sample"}}
    assert small(f"valid_dataset={word}", **held).valid_dataset is None
    assert small(f"trial_name={word}", trial_name="x").trial_name is None
    assert small(f"total_train_steps={word}", total_train_steps=3).total_train_steps is None
    assert small(f"valid_dataset.num_rows={word}", **held).valid_dataset.num_rows is None
    assert (
        small("valid_dataset.from_train=0.1", f"valid_dataset.path={word}", **held).valid_dataset.path is None
    )


@pytest.mark.parametrize("word", NOTHING)
@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("train_dataset.path", "a text"),
        ("cluster.fileroot", "a text"),
        ("actor.beta", "a number greater than 0"),
        ("actor.loss_type", "one of sigmoid, "),
        ("saver.best", "true or false"),
    ],
)
def test_nothing_where_something_is_needed_says_which_words_mean_nothing(field, allowed, word):
    (line,) = problems([f"{field}={word}"])
    assert line.startswith(f"{field} = ")
    assert f" is empty (null, ~ and None mean nothing); give {allowed}" in line


@pytest.mark.parametrize("word", [*NOTHING, None, "", " ", {}, []])
def test_nothing_as_a_parameter_or_top_level_key_says_nothing(word):
    demo = notebook()[0]
    assert demo.valid_dataset is not None
    names = dict.fromkeys(config.parameter_names(), word)
    assert notebook(**names)[0] == demo
    assert small(valid_dataset=word, trial_name=word, seed=word) == small()
    assert config.read_list("betas", word, float) == config.read_list("loss_types", word, str) == []


@pytest.mark.parametrize("word", ["null", "Null", "NULL", "~", "None", ""])
def test_nothing_in_a_file_means_the_same_to_papermill(tmp_path, word):
    text = json.dumps({**SMALL, "ref": {"path": "tiny-random"}}).removesuffix("}")
    path = write(tmp_path, text + f', "saver": {{"freq_steps": {word}}}, "valid_dataset": {word}}}')
    c = config.load(path)
    assert (c.saver.freq_steps, c.valid_dataset) == (None, None)
    assert notebook(**papermill_file(path))[0] == c


def test_a_parameter_that_is_none_after_f_takes_the_section_of_the_file_away():
    """papermill puts -p over -f before we see either: the file's section is gone, and the first lines say so."""
    given = {**papermill_file(config.find_path("config", "params/demo.yaml", config.project_root()))}
    assert given["valid_dataset"]
    c, lines = notebook(**{**given, "valid_dataset": None})
    assert c.valid_dataset is None
    assert "valid_dataset" in lines[0].partition("; left out, so the package defaults hold: ")[2]
    assert notebook(config="params/demo.yaml", valid_dataset=None)[0].valid_dataset is not None
    assert notebook(config="params/demo.yaml", overrides=["valid_dataset=null"])[0].valid_dataset is None


def test_a_field_that_may_be_null_says_so():
    (line,) = problems(["total_train_steps=none"])
    assert line == "total_train_steps = 'none' is text; give a whole number at least 1 or null"
    (line,) = problems(["valid_dataset=none"])
    assert line == "valid_dataset = 'none' is not a section; give valid_dataset.key=value, or null"
