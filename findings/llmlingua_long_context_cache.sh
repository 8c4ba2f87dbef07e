#!/usr/bin/env bash
# llmlingua 0.2.2 with transformers 5.2.0, which its requirements allow: a context longer than one iteration fails.
#
# From the second iteration on the compressor cuts the keys and values that the model has returned, and takes each
# layer of them for a pair. transformers returns a cache object whose layers have three parts. So short contexts (one
# iteration, 200 tokens by default) are read, and the longer ones that compression is for raise. A larger
# iterative_size hides it.
# Seen: 100 words give a prompt; 600 words raise "too many values to unpack (expected 2)"; with iterative_size=2000 they
# give one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check llmlingua==0.2.2 transformers==5.2.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2>/dev/null
import random
from types import SimpleNamespace

import tiktoken
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

vocabulary = [f"w{n}" for n in range(200)] + ["<s>", "</s>", "."]
words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="."))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")
torch.manual_seed(0)
size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
size |= dict(max_position_embeddings=4096)
LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **size)).save_pretrained("model")
tokenizer.save_pretrained("model")

# It counts tokens with a vocabulary from the network; this one counts words.
tiktoken.encoding_for_model = lambda name: SimpleNamespace(encode=str.split)
from llmlingua import PromptCompressor

compressor = PromptCompressor("model", device_map="cpu", model_config={"trust_remote_code": False})
draw = random.Random(0)
found = {}
for count, more in ((100, {}), (600, {}), (600, {"iterative_size": 2000})):
    text = " ".join(f"w{draw.randrange(200)}" for _ in range(count))
    try:
        kept = compressor.compress_prompt([text], target_token=50, use_sentence_level_filter=False, **more)
        found[count, bool(more)] = type(kept["compressed_prompt"]).__name__
    except ValueError as error:
        found[count, bool(more)] = str(error)
print(found)
assert found == {
    (100, False): "str",
    (600, False): "too many values to unpack (expected 2)",
    (600, True): "str",
}, found
PYTHON
