"""What other packages make of the same questions: kvpress and LLMLingua, in an environment of their own, through files.

    python -m venv RIVALS && RIVALS/bin/pip install torch==2.13.0
    RIVALS/bin/pip install kvpress==0.5.5 llmlingua==0.2.2 torch==2.13.0
    python -m megactx.studies.qa MODEL ... --out qa                                     writes qa/cases.jsonl
    RIVALS/bin/python benchmarks/rivals.py FOLDER qa/cases.jsonl --budget 4 --out qa/rivals.jsonl
    python -m megactx.studies.qa MODEL ... --out qa --scores qa/rivals.jsonl            one table of all

FOLDER is a Hugging Face folder of the same base LM; nothing is asked of a hub. Needs no megactx. ``full`` keeps all of
the context: it must say what the study's full context says.

    snapkv, expected_attention, knorm, streaming_llm    ``--budget`` keys and values a head, the begin's tokens beside
    llmlingua                                           at most about ``--budget`` tokens of text, chosen by the base LM
"""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar

PRESSES = ("snapkv", "expected_attention", "knorm", "streaming_llm")
RIVALS = (*PRESSES, "llmlingua", "full")


def press(name: str, kept: int, of: int):
    """A press that keeps so many entries. Sizes are those of the package; but SnapKV's window has to fit into them."""
    import kvpress

    ratio = {"compression_ratio": 1 - (kept + 0.5) / of}  # the package rounds down
    if name == "snapkv":
        return kvpress.SnapKVPress(window_size=max(1, min(64, kept // 2)), **ratio)
    kinds = {
        "expected_attention": kvpress.ExpectedAttentionPress,
        "knorm": kvpress.KnormPress,
        "streaming_llm": kvpress.StreamingLLMPress,
    }
    return kinds[name](**ratio)


class Words:
    """In place of the vocabulary of gpt-3.5, which tiktoken gets from the network; LLMLingua only reports with it."""

    def __init__(self, tokenizer):
        self.encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


class Lingua:
    """LLMLingua with the base LM as its small model, without its filter of sentences: there is one short context."""

    def __init__(self, folder: str, tokenizer):
        import tiktoken

        tiktoken.encoding_for_model = lambda name: Words(tokenizer)
        from llmlingua import PromptCompressor

        self.tokenizer = tokenizer
        self.compressor = PromptCompressor(folder, device_map="cpu", model_config={"trust_remote_code": False})

    def keep(self, row: dict, budget: int) -> list[int]:
        """Ids of the compressed context, at most ``budget``."""
        # One iteration: in several the package hands on keys and values as lists, which transformers 5 does not take.
        given = {"iterative_size": len(row["ids"]) + 1, "use_sentence_level_filter": False, "target_token": budget}
        found = self.compressor.compress_prompt([row["context"]], question="", **given)["compressed_prompt"]
        return self.tokenizer(found, add_special_tokens=False)["input_ids"][:budget]


@torch.no_grad()
def answer(model, row: dict, kept: list[int], context=None, position: int | None = None) -> dict:
    """Read begin and kept tokens, inside ``context``, then the question at ``position``: what is said of the values."""
    first = torch.tensor([[*row["begin"], *kept]])
    cache = DynamicCache()
    with context or nullcontext():
        places = torch.arange(first.shape[1])[None]
        model(first, past_key_values=cache, position_ids=places, use_cache=True, logits_to_keep=1)
    entries = cache.get_seq_length() - len(row["begin"])
    at = first.shape[1] if position is None else position
    end = torch.tensor([row["end"]])
    places = torch.arange(at, at + end.shape[1])[None]
    logits = model(end, past_key_values=cache, position_ids=places, use_cache=True, logits_to_keep=1).logits
    values = row["value_ids"]
    nll, greedy = _values(model, cache, logits[:, -1:], at + end.shape[1], values)
    right = row["values"].index(row["answer"][0])
    said = int(nll.argmin()) == right if len(values) > 1 else bool(greedy[right])
    return {"entries": entries, "right": said, "nll": float(nll[right])}


def _values(model, cache, logits: Tensor, at: int, values: list[list[int]]) -> tuple[Tensor, Tensor]:
    """NLL of each value, and whether greedy decoding says it."""
    longest = max(map(len, values))
    ids = torch.tensor([[*value, *[0] * (longest - len(value))] for value in values])  # [V, A]
    logits = logits.expand(len(values), -1, -1)
    if longest > 1:
        cache.batch_repeat_interleave(len(values))
        places = torch.arange(at, at + longest - 1).expand(len(values), -1)
        more = model(ids[:, :-1], past_key_values=cache, position_ids=places, use_cache=True).logits
        logits = torch.cat([logits, more], dim=1)
    there = torch.arange(longest) < torch.tensor([len(value) for value in values])[:, None]
    nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")
    return (nll * there).sum(1), ((logits.argmax(-1) == ids) | ~there).all(1)


def measured(model, tokenizer, row: dict, name: str, budget: int, lingua: Lingua | None) -> dict:
    """A question over what a rival keeps of its context."""
    begin, tokens = len(row["begin"]), len(row["ids"])
    if name == "full":
        return answer(model, row, row["ids"])
    if name == "llmlingua":
        return answer(model, row, lingua.keep(row, budget))
    pressed = press(name, begin + budget, begin + tokens)(model)
    return answer(model, row, row["ids"], pressed, begin + tokens)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="Hugging Face folder of the base LM")
    parser.add_argument("cases", type=Path, help="cases.jsonl of megactx.studies.qa")
    parser.add_argument("--rivals", nargs="+", default=[*PRESSES, "llmlingua"], choices=RIVALS)
    parser.add_argument("--budget", type=int, required=True, help="entries of the context that are kept")
    parser.add_argument("--questions", type=int, help="of each task (default all)")
    parser.add_argument("--out", type=Path, required=True, help="file of the answers, which lines are added to")
    args = parser.parse_args(arguments)
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    lingua = Lingua(args.folder, tokenizer) if "llmlingua" in args.rivals else None
    rows = [json.loads(line) for line in args.cases.read_text().splitlines()]
    done = set()
    if args.out.exists():
        found = map(json.loads, args.out.read_text().splitlines())
        done = {(row["task"], row["number"], row["carrier"]) for row in found}
    with args.out.open("a") as file:
        for row in rows:
            if args.questions is not None and row["number"] >= args.questions:
                continue
            if not 0 < args.budget < len(row["ids"]):
                parser.error(f"--budget={args.budget} is not allowed: 1 to {len(row['ids']) - 1}")
            for name in args.rivals:
                key = (row["task"], row["number"], name if name == "full" else f"{name} {args.budget}")
                if key in done:
                    continue
                told = dict(zip(("task", "number", "carrier"), key, strict=True))
                told |= measured(model, tokenizer, row, name, args.budget, lingua)
                print(json.dumps(told), file=file, flush=True)
                print(f"{row['task']} {row['number']} {told['carrier']}: {told['right']}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
