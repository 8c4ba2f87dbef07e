#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: the tokenizer of a GGUF file of kind gpt2 has a token that the file has not.
#
# A file whose vocabulary has no <|endoftext|>, such as one with <s> and </s>, is read without a message, and the tokenizer
# then has <|endoftext|> all the same, with the next free id: one beyond the last row of the model's embeddings. BOS and EOS
# are those of the file, so nothing shows it until that text is tokenised and the id is looked up.
# Seen: 259 tokens in the file, 260 in the tokenizer, and the text <|endoftext|> becomes id 259.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check numpy==2.4.6 transformers==5.23.0 gguf==0.19.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import numpy as np
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

folder = sys.argv[1]
tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab"]
writer = GGUFWriter(f"{folder}/model.gguf", "llama")
writer.add_vocab_size(len(tokens))
writer.add_context_length(64)
writer.add_embedding_length(8)
writer.add_block_count(1)
writer.add_feed_forward_length(16)
writer.add_head_count(1)
writer.add_head_count_kv(1)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_freq_base(10000.0)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("gpt-2")
writer.add_token_list(tokens)
writer.add_token_types([3, 3, *[1] * 257])  # two control tokens, the rest normal
writer.add_token_merges(["a b"])
writer.add_bos_token_id(0)
writer.add_eos_token_id(1)
writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
assert len(tokenizer) == len(tokens) + 1 == 260, len(tokenizer)
ids = tokenizer("<|endoftext|>", add_special_tokens=False)["input_ids"]
assert ids == [len(tokens)], ids
print(len(tokens), "tokens in the file,", len(tokenizer), "in the tokenizer; <|endoftext|> is", ids)
PYTHON
