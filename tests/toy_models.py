"Toy models that more than one test asks."

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def shaped(vocab, kind=(LlamaConfig, LlamaForCausalLM), tied=False, **more):
    "A model with fewer key heads than heads and large random weights, so that its log-likelihoods differ much."
    torch.manual_seed(3)
    config = kind[0](
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.4,
        **more,
    )
    return kind[1](config).eval()
