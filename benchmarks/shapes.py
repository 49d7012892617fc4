"Shapes of known models, which benchmarks give to models with random weights."


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict:
    "Arguments of LlamaConfig."
    return dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=tied,
    )


SMOLLM2_135M = llama(576, 1536, 30, 9, 3, 49152, True)
LLAMA_1B = llama(2048, 8192, 16, 32, 8, 128256, True)
SOLAR = llama(4096, 14336, 48, 32, 8, 32000, False)
