"""``python trl_masks.py FOLDER`` in an environment with trl: its labels of FOLDER/rows.json, to FOLDER/labels.json."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

folder = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
talks = json.loads((folder / "rows.json").read_text())
trainer = SFTTrainer(
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)),
    SFTConfig(folder / "out", assistant_only_loss=True, max_length=None, use_cpu=True, report_to=[]),
    train_dataset=Dataset.from_list([{"messages": talk} for talk in talks]),
    processing_class=tokenizer,
)
found = []
for row in trainer.train_dataset:
    batch = trainer.data_collator([row])
    found.append({name: batch[name][0].tolist() for name in ("input_ids", "labels")})
(folder / "labels.json").write_text(json.dumps(found))
