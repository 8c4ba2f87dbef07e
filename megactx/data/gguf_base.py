"""A GGUF file as a base LM: converted once into a Hugging Face folder of the cache, loaded from there ever after.

    python -m megactx.data.gguf_base FILE.gguf          now, and not when it is first used

transformers reads the file with the package ``gguf``. What it would leave out or read as something else without a word
is refused here; how such a file splits text before it is encoded is mended where transformers does not know it.
"""

import argparse
import io
import json
import logging
import re
import sys
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory

from megactx.assets import is_gguf, resolve
from megactx.framework.command_line import run
from megactx.framework.errors import RunFailed
from megactx.framework.files import checksum, replacing

from .documents import cache_folder
from .tokenizer import tokenizer_hash

log = logging.getLogger(__name__)

VERSION = "1"  # of what is made of a file: with another one all are converted anew
ELSEWHERE = "set MEGACTX_CACHE to another folder; it needs 4 bytes for each weight"
# ``tokenizer.ggml.pre`` of byte-level vocabularies: each digit alone and then as GPT-2 does; as GPT-2 does.
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
AS_GPT2 = ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # as transformers and the file say it
SPACE = "\u2581"  # as sentencepiece writes it
ROPE = "rope_freqs.weight"  # by how much each frequency is divided; transformers leaves it out
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PATIENCE = 5  # seconds that a hub may take to answer
CONTROL = 3  # ``tokenizer.ggml.token_type`` of a special token


def loadable(name: str | Path | None, setting: str = "base.name") -> str:
    """What transformers can load: what ``resolve`` gives, and for a GGUF file its folder in the cache. Where no hub
    answers, a name on one is the folder that was kept of it.

    The folder goes by the checksum of what is in the file. Weights are kept in fp32: none is rounded, and they are
    there at once, for they are mapped into memory and not converted.

    Args:
        name: as given by ``setting``, which an error names.

    Raises:
        ValueError: see ``resolve``; no hub answers, and nothing was kept of that name; the package ``gguf`` is missing;
            the file is damaged, or of an architecture, a quantisation or a tokenizer that is not known; the cache may
            not be written.
        RunFailed: the disk of the cache is full.
    """
    found = resolve(name, setting)
    if not is_gguf(found):
        return found if Path(found).is_dir() else _of_hub(found, f"{setting}={name}")
    path, what = Path(found), f"{setting}={name}"
    digest = _checksum(path, what)
    folder = cache_folder() / f"gguf-{VERSION}-{digest[:20]}"
    if not folder.is_dir():
        _convert(path, folder, digest, what)
    return str(folder)


def _of_hub(name: str, what: str) -> str:
    """The name, where a hub answers; else transformers would ask it again and again, for most of a minute."""
    from huggingface_hub import constants, get_session, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except HfHubHTTPError:  # it is there, and has something to say
        return name
    except Exception as error:  # of the library below, which has changed, or that no hub may be asked
        try:
            return snapshot_download(name, local_files_only=True)
        except LocalEntryNotFoundError:
            raise ValueError(
                f"{what}: there is no such folder, nothing was kept of a model of that name, and {constants.ENDPOINT}"
                f" does not answer ({str(error).strip() or type(error).__name__})"
            ) from None
    return name


def _checksum(path: Path, what: str) -> str:
    try:
        return checksum(path)
    except OSError as error:
        raise ValueError(f"{what}: the file cannot be read ({error.strerror})") from error


def _convert(path: Path, folder: Path, digest: str, what: str) -> None:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"{what}: a GGUF file needs the package gguf: pip install 'megactx[gguf]'") from error
    log.warning("%s is converted once, which may take a minute; kept in %s", path.name, folder)
    try:
        reader = _opened(gguf, path)
        _check_types(gguf, reader)
        _check_fields(reader)
        ids = {name: _field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
        model = _model(path, ids, next((t.data for t in reader.tensors if t.name == ROPE), None))
        _check_left_out(gguf, reader, model)
        tokenizer = _tokenizer(path, reader, ids)
    except (MemoryError, RunFailed):
        raise
    except Exception as error:  # two libraries read what anybody may have written, and raise what comes
        raise ValueError(f"{what}: this GGUF file cannot be a base LM ({_sentence(error)})") from error
    with replacing(folder, ELSEWHERE) as part:
        part.mkdir()
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "source.json").write_text(json.dumps({"file": path.name, "sha256": digest}, indent=1))


def _opened(gguf, path: Path):
    try:
        return gguf.GGUFReader(path)
    except Exception as error:
        if found := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error)):
            raise ValueError(f"its tensors are of an unknown quantisation, type {found[1]}") from error
        raise ValueError(f"it is damaged, cut short, or no GGUF file: {_sentence(error)}") from error


def _check_types(gguf, reader) -> None:
    """Unpack one row of each quantisation."""
    for tensor in {t.tensor_type: t for t in reader.tensors}.values():
        try:
            gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{tensor.name} is of the quantisation {tensor.tensor_type.name}: {error}") from error


def _field(reader, key: str, default=None):
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _check_fields(reader) -> None:
    """Refuse what transformers would pass over."""
    kind = _field(reader, "general.architecture")
    if kind is None:
        raise ValueError("it names no general.architecture")
    if (parts := _field(reader, "split.count", 1)) > 1:
        raise ValueError(f"it is one of {parts} parts; join them: llama-gguf-split --merge")
    scaling = _field(reader, f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{kind}.rope.scaling.type={scaling}, which transformers does not read from such files")
    if not _field(reader, "tokenizer.ggml.tokens"):
        raise ValueError("it has no tokenizer: tokenizer.ggml.tokens is missing")
    if _field(reader, "tokenizer.ggml.model") == "gpt2":
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        pre = _field(reader, "tokenizer.ggml.pre", "default")
        if pre not in (*DIGITS, *AS_GPT2, *GGUF_PRE_TOKENIZER_SPLITS):
            raise ValueError(f"tokenizer.ggml.pre={pre}: transformers does not know how such a tokenizer splits text")


def _check_left_out(gguf, reader, model) -> None:
    """Every tensor of the file has a place in the model."""
    if any("_exps." in t.name for t in reader.tensors):  # several tensors become one
        return
    kind = _field(reader, "general.architecture")
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names, taken = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers), {ROPE}
    for key in model.state_dict():
        stem, _, ending = key.rpartition(".")
        taken.add(f"{names.get_name(stem)}.{ending}")
    if left := [t.name for t in reader.tensors if t.name not in taken]:
        raise ValueError(f"transformers leaves {len(left)} of its tensors out, the first is {left[0]}")


def _alone(path: Path, folder: str) -> dict:
    """The file in a folder of its own: what lies beside it, say a tokenizer's files, is not of it."""
    link = Path(folder, "model.gguf")
    if not link.exists():
        link.symlink_to(path)
    return {"pretrained_model_name_or_path": folder, "gguf_file": link.name, "trust_remote_code": False}


def _model(path: Path, ids: dict, divided=None):
    """A plain model in fp32; one that was unpacked from blocks cannot be saved."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):  # a bar that nothing else switches off
        found, report = AutoModelForCausalLM.from_pretrained(
            **_alone(path, folder),
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    if wrong := sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"]):
        raise ValueError(f"{len(wrong)} tensors are missing or have another shape, the first is {wrong[0]}")
    config = found.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    # Where the file says nothing, no token is special: an architecture's defaults would end answers at any word.
    config |= {f"{name}_token_id": index for name, index in ids.items() if name != "unk"}
    if divided is not None:
        config["rope_parameters"] = _llama3(config, torch.tensor(divided))
    with torch.device("meta"):
        plain = type(found)(AutoConfig.for_model(**config))
    plain.load_state_dict(found.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _llama3(config: dict, divided) -> dict:
    """Rope parameters of Llama 3.1 and later; such a file keeps only what each frequency [d / 2] is divided by."""
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = config["rope_parameters"]["rope_theta"]
    asked = LLAMA3 | {"rope_theta": theta, "factor": float(divided.max())}
    trial = AutoConfig.for_model(**config | {"rope_parameters": asked})
    found = ROPE_INIT_FUNCTIONS["llama3"](trial, "cpu")[0]
    plain = theta ** (-torch.arange(len(found)) / len(found))
    if divided.shape != found.shape or not (plain / found).allclose(divided, rtol=1e-3):
        raise ValueError(f"{ROPE} is not how Llama 3 scales its rotation, and transformers leaves it out")
    return asked


def _tokenizer(path: Path, reader, ids: dict):
    """The file's tokenizer, compared with the file's own fields."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokens = _field(reader, "tokenizer.ggml.tokens")
    with TemporaryDirectory() as folder:
        found = AutoTokenizer.from_pretrained(**_alone(path, folder))
        state = json.loads(found.backend_tokenizer.to_str())
        # transformers adds an end of its own where the file has another: an id for which the model has no row.
        state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] in {*tokens}]
        if _field(reader, "tokenizer.ggml.model") == "gpt2" and _field(reader, "tokenizer.ggml.pre") in DIGITS:
            # It leaves digits in the words: of two spaces before a number it makes two tokens, not one.
            digits = {"type": "Digits", "individual_digits": True}
            state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, BYTE_LEVEL]}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)),
            chat_template=_field(reader, "tokenizer.chat_template"),
            **{f"{name}_token": tokens[index] for name, index in ids.items() if index is not None},
        )
        _check_tokenizer(tokenizer, reader, ids)
        tokenizer.save_pretrained(Path(folder, "saved"))
        if tokenizer_hash(AutoTokenizer.from_pretrained(Path(folder, "saved"))) != tokenizer_hash(tokenizer):
            raise ValueError("its tokenizer is another one when it is saved and loaded")
    return tokenizer


def _check_tokenizer(tokenizer, reader, ids: dict) -> None:
    for name, index in ids.items():
        if index is not None and (found := getattr(tokenizer, f"{name}_token_id")) != index:
            raise ValueError(f"tokenizer.ggml.{SPECIAL[name]}_token_id={index}, but the tokenizer has {found}")
    tokens, types = (_field(reader, f"tokenizer.ggml.{name}", []) for name in ("tokens", "token_type"))
    if len(tokenizer) > len(tokens):
        raise ValueError(f"tokenizer.ggml.tokens has {len(tokens)} ids, but the tokenizer {len(tokenizer)}")
    for index, (token, kind) in enumerate(zip(tokens, types, strict=False)):
        if kind == CONTROL and tokenizer(token, add_special_tokens=False)["input_ids"] != [index]:
            raise ValueError(f"tokenizer.ggml.tokens: {token} is a special token, but it is not encoded as {index}")
    digits = [digit for digit in "0123456789" if digit in tokens]
    if _field(reader, "tokenizer.ggml.pre") in DIGITS and tokenizer.tokenize("".join(digits)) != digits:
        raise ValueError("tokenizer.ggml.pre: the tokenizer does not split digits one by one")
    if _field(reader, "tokenizer.ggml.model") == "llama":
        asked = _field(reader, "tokenizer.ggml.add_space_prefix", True)
        if bool(asked) != tokenizer.tokenize("x")[0].startswith(SPACE):
            raise ValueError(f"tokenizer.ggml.add_space_prefix={asked}, which transformers does not read")


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def convert(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: it is another file than it should be; and see ``loadable``.
    """
    found, what = resolve(args.file, "file"), f"file={args.file}"
    if not is_gguf(found):
        raise ValueError(f"{what}: it is no GGUF file, there is nothing to convert")
    if args.sha256 and (digest := _checksum(Path(found), what)) != args.sha256:
        raise ValueError(f"{what}: its sha256 is {digest}, wanted is {args.sha256}")
    print(f"{args.file}: {loadable(args.file, 'file')}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.data.gguf_base", description=__doc__.split("\n")[0])
    parser.add_argument("file", help="a GGUF file, a folder with one in it, or asset:smollm2")
    parser.add_argument("--sha256", help="refuse a file with another checksum")
    return run(convert, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
