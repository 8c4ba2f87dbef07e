"""A whole run in miniature: the base_lm stage with a few thousand parameters on text that is written here."""

import pytest


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_tokenizer):
    """Overrides of a run of 4 steps; a test adds ``folder=...``."""
    from megactx.data.documents import TRAIN, VALIDATION, split_of

    texts, tokenizer = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(tokenizer)
    written = {TRAIN: 0, VALIDATION: 0}
    for number in range(200):
        text = " ".join(f"line {i} of text {number}: the fox number {i * number} jumps." for i in range(40))
        side = split_of(text)
        if written[side] < 3:
            (texts / f"{number}.txt").write_text(text)
            written[side] += 1
    assert all(written.values())
    size = "{model_type:llama,vocab_size:512,hidden_size:32,intermediate_size:64,num_hidden_layers:1"
    size += ",num_attention_heads:2,num_key_value_heads:2,max_position_embeddings:256"
    size += ",bos_token_id:0,eos_token_id:null,pad_token_id:1,tie_word_embeddings:true}"
    return [
        "experiment=base_lm",
        "data=files",
        f"data.path={texts}",
        f"base.name={tokenizer}",
        f"stage.config={size}",
        "+stage.config.attention_dropout=0.1",  # draws random numbers in every step
        "stage.decay=0.0",
        "datamodule.phases=[{steps:100,tokens:128,batch:2}]",
        "datamodule.weights.code=0",
        "datamodule.weights.structured=0",
        "+datamodule.validation_batches=1",
        "preset.steps=4",
        "preset.warmup=1",
        "preset.validate_every=2",
        "trainer=cpu",
        "trainer.precision=32-true",
        "trainer.log_every_n_steps=1",
    ]
