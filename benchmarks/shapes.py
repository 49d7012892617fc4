"Shapes of known models, which benchmarks give to models with random weights; and such models."
from pathlib import Path


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict:
    "Arguments of LlamaConfig."
    return dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=tied,
    )


SMOLLM2_135M = llama(576, 1536, 30, 9, 3, 49152, True)
LLAMA_1B = llama(2048, 8192, 16, 32, 8, 128256, True)
SOLAR = llama(4096, 14336, 48, 32, 8, 32000, False)


def random_llama(shape: dict, dtype: str = 'float32', device: str = 'cpu'):
    "A model of a shape with random weights, the same ones each time."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    config = LlamaConfig(**shape, max_position_embeddings=8192, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    try:
        with torch.device(device): return LlamaForCausalLM(config)
    finally: torch.set_default_dtype(torch.float32)


def random_base(out: Path, shape: dict, dtype: str = 'float32', device: str = 'cpu') -> Path:
    "Such a model as a base on the disk, with the shipped tokenizer."
    from transformers import PreTrainedTokenizerFast
    from solar_repro.tiny.world import shipped_base
    random_llama(shape, dtype, device).save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(shipped_base(), local_files_only=True).save_pretrained(out)
    return out
