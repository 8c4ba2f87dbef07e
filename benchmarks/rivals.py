"""What other packages make of the same questions: kvpress and LLMLingua, in an environment of their own, through files.

    python -m venv RIVALS && RIVALS/bin/pip install torch==2.13.0
    RIVALS/bin/pip install kvpress==0.5.5 llmlingua==0.2.2 torch==2.13.0
    python -m megactx.studies.qa MODEL ... --out qa                                     writes qa/cases.jsonl
    RIVALS/bin/python benchmarks/rivals.py FOLDER qa/cases.jsonl --budgets 4 32 --out qa/rivals.jsonl
    python -m megactx.studies.qa MODEL ... --out qa --scores qa/rivals.jsonl            one table of all

FOLDER is a Hugging Face folder of the same base LM; nothing is asked of a hub. Needs no megactx. ``full`` keeps all of
the context: it must say what the study's full context says.

    snapkv, expected_attention, knorm, streaming_llm    ``--budgets`` keys and values a head, the begin's tokens beside
    llmlingua                                           at most about as many tokens of text, chosen by the base LM
"""

import argparse
import copy
import json
import sys
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
        # One iteration: in a second one the package unpacks the cache in pairs, which that of transformers 5 is not.
        given = {"iterative_size": len(row["ids"]) + 1, "use_sentence_level_filter": False, "target_token": budget}
        found = self.compressor.compress_prompt([row["context"]], question="", **given)["compressed_prompt"]
        return self.tokenizer(found, add_special_tokens=False)["input_ids"][:budget]


class Read:
    """The base LM's pass over the begin and the context of one question: what presses look at, and nothing pressed."""

    def __init__(self, model, row: dict):
        self.model, self.cache, self.inputs = model, DynamicCache(), []
        ids, hooks = torch.tensor([[*row["begin"], *row["ids"]]]), []

        def seen(module, given, named, output) -> None:
            self.inputs.append((module, {name: value for name, value in named.items() if name != "past_key_values"}))

        try:
            for layer in model.model.layers:
                hooks.append(layer.self_attn.register_forward_hook(seen, with_kwargs=True))
            _continue(model, self.cache, ids, 0)
        finally:
            for hook in hooks:
                hook.remove()

    def pressed(self, press) -> DynamicCache:
        """A cache of its own as the press leaves it: pressing changes what is kept of a pass, not the pass."""
        cache = copy.deepcopy(self.cache)
        with press(self.model):
            pass  # it prepares the layers
        for module, named in self.inputs:
            press.forward_hook(module, [], named | {"past_key_values": cache}, (None, None))
        return cache


def _continue(model, cache: DynamicCache, ids: Tensor, at: int, **given) -> Tensor:
    """Read ids [B, T] from position ``at`` on, behind the cache -> logits."""
    places = torch.arange(at, at + ids.shape[1]).expand(len(ids), -1)
    return model(ids, past_key_values=cache, position_ids=places, use_cache=True, **given).logits


def answer(model, row: dict, cache: DynamicCache, at: int) -> dict:
    """The question from position ``at`` on, behind a cache: what is said of the values."""
    entries, end = cache.get_seq_length() - len(row["begin"]), torch.tensor([row["end"]])
    logits = _continue(model, cache, end, at, logits_to_keep=1)
    values = row["value_ids"]
    nll, greedy = _values(model, cache, logits, at + end.shape[1], values)
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
        logits = torch.cat([logits, _continue(model, cache, ids[:, :-1], at)], dim=1)
    there = torch.arange(longest) < torch.tensor([len(value) for value in values])[:, None]
    nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")
    return (nll * there).sum(1), ((logits.argmax(-1) == ids) | ~there).all(1)


@torch.no_grad()
def measured(model, row: dict, names: list[tuple[str, int]], lingua: Lingua | None = None) -> list[dict]:
    """A question over what each rival keeps of its context: (name, budget) -> answer."""
    begin, tokens, found = len(row["begin"]), len(row["begin"]) + len(row["ids"]), []
    read = Read(model, row) if any(name != "llmlingua" for name, _ in names) else None
    for name, budget in names:
        if name == "llmlingua":
            cache, kept = DynamicCache(), [*row["begin"], *lingua.keep(row, budget)]
            _continue(model, cache, torch.tensor([kept]), 0, logits_to_keep=1)
            found.append(answer(model, row, cache, len(kept)))
        else:
            whole = name == "full"
            cache = copy.deepcopy(read.cache) if whole else read.pressed(press(name, begin + budget, tokens))
            found.append(answer(model, row, cache, tokens))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="Hugging Face folder of the base LM")
    parser.add_argument("cases", type=Path, help="cases.jsonl of megactx.studies.qa")
    parser.add_argument("--rivals", nargs="+", default=[*PRESSES, "llmlingua"], choices=RIVALS)
    parser.add_argument("--budgets", nargs="+", type=int, required=True, help="entries of the context that are kept")
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
            if wrong := [count for count in args.budgets if not 0 < count < len(row["ids"])]:
                parser.error(f"--budgets={wrong[0]} is not allowed: 1 to {len(row['ids']) - 1}")
            names = [(name, count) for name in args.rivals for count in args.budgets]
            every = {name if name == "full" else f"{name} {count}": (name, count) for name, count in names}
            about = {"task": row["task"], "number": row["number"]}
            missing = [carrier for carrier in every if (*about.values(), carrier) not in done]
            found = measured(model, row, [every[carrier] for carrier in missing], lingua)
            for carrier, told in zip(missing, found, strict=True):
                print(json.dumps(about | {"carrier": carrier} | told), file=file, flush=True)
            print(f"{row['task']} {row['number']}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
