"""How the tiny profile's learning rates were chosen: by the loss on rows that training has not seen, never by a
benchmark or a table.

    python benchmarks/learning_rates.py [--profile tiny] [--seed 100]

The paper gives no learning rate. For SFT the script trains SFT v3's data once per rate and prints the mean loss of an
answer's token on fresh rows
of the same three sets; for DPO it starts from the profile's own SFT v3 and prints, per rate, the DPO loss, the share
of pairs in the right order and
the mean margin in nats on fresh pairs of Ultrafeedback Clean. Rows are drawn with `--seed`, as many as the profile
trains on and half as many
fresh ones; the tables draw theirs with other seeds. A rate is a good one where the fresh loss is lowest; where the
loss on trained rows falls on while the fresh loss rises,
it is too high.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

for k, v in dict(
    GOMP_SPINCOUNT='30000', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', PYTHONWARNINGS='ignore'
).items():
    os.environ.setdefault(k, v)

SFT_RATES = 6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3
DPO_RATES = 3e-5, 1e-4, 3e-4, 1e-3, 3e-3


def answer_loss(point, rows: list[dict], template) -> float:
    "Mean loss of an answer's token, nats, over all answers."
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from solar_repro.dpo import completion_logps
    from solar_repro.models.loading import encode, load_tokenizer
    from solar_repro.models.adapters import materialize

    model, total, n = materialize(point), 0.0, 0
    coded = sorted(
        encode(load_tokenizer(point.base), template, [(r['prompt'], r['completion']) for r in rows]),
        key=lambda pa: len(pa[0] + pa[1]),
    )
    for i in range(0, len(coded), 32):
        ids = pad_sequence([torch.tensor(p + a) for p, a in coded[i : i + 32]], batch_first=True)
        labels = pad_sequence(
            [torch.tensor([-100] * len(p) + a) for p, a in coded[i : i + 32]], batch_first=True, padding_value=-100
        )
        with torch.inference_mode():
            total -= completion_logps(model(input_ids=ids).logits, labels).sum().item()
        n += (labels != -100).sum().item()
    return total / n


def main(profile: str, seed: int) -> None:
    import torch

    from solar_repro.dpo import reference_logps, train_dpo
    from solar_repro.models.adapters import AdaptedModel
    from solar_repro.core.config import load_profile
    from solar_repro.pipeline.graph import DPO_STARTS, SFT_ROWS
    from solar_repro.pipeline.sources import source_of
    from solar_repro.sft import train_sft
    from solar_repro.tiny.world import shipped_base

    p, base = load_profile(profile), AdaptedModel(shipped_base())
    torch.set_num_threads(p.machine.threads)
    torch.set_flush_denormal(True)

    def split(sets):
        "As many rows as the profile trains on, and half as many others."
        train, fresh = [], []
        for name in sets:
            n = p.data.rows[name]
            drawn = source_of(p.data.source).rows(name, n + n // 2, seed).rows
            train += drawn[:n]
            fresh += drawn[n:]
        return train, fresh

    (train, fresh), (pairs, fresh_pairs) = split(SFT_ROWS['SFT v3']), split(DPO_STARTS['DPO v1'][1])
    with TemporaryDirectory() as d:
        d = Path(d)
        print(f'{"SFT v3, rate":<16}{"loss, trained rows":>20}{"loss, fresh rows":>18}')
        print(
            f'{"base":<16}{answer_loss(base, train[::2], p.template):>20.4f}'
            f'{answer_loss(base, fresh, p.template):>18.4f}',
            flush=True,
        )

        def sft(rate):
            train_sft(
                base.base, train, d / f'sft{rate}', p.sft.model_copy(update=dict(learning_rate=rate)), p.template, seed
            )
            return AdaptedModel(base.base, ((d / f'sft{rate}' / 'adapter', 1.0),))

        for rate in SFT_RATES:
            point = sft(rate)
            print(
                f'{rate:<16.2g}{answer_loss(point, train[::2], p.template):>20.4f}'
                f'{answer_loss(point, fresh, p.template):>18.4f}',
                flush=True,
            )
        start = sft(p.sft.learning_rate)
        ref, ref_fresh = (reference_logps(start, x, p.dpo, p.template) for x in (pairs, fresh_pairs))
        print(
            f'\nDPO from SFT v3 at {p.sft.learning_rate:g}, beta'
            f' {p.dpo.beta:g}\n{"rate":<16}{"loss, fresh":>12}{"right order":>13}'
            f'{"margin, nats":>14}{"chosen, nats":>14}'
        )
        for rate in DPO_RATES:
            out = d / f'dpo{rate}'
            train_dpo(start, pairs, ref, out, p.dpo.model_copy(update=dict(learning_rate=rate)), p.template, seed)
            change = (
                reference_logps(AdaptedModel(base.base, ((out / 'adapter', 1.0),)), fresh_pairs, p.dpo, p.template)
                - ref_fresh
            )
            margin = torch.tensor((change.chosen - change.rejected).values)
            loss = -torch.nn.functional.logsigmoid(p.dpo.beta * margin).mean().item()
            print(
                f'{rate:<16.2g}{loss:>12.4f}{(margin > 0).double().mean():>13.1%}'
                f'{margin.mean():>14.1f}{change.chosen.mean():>14.1f}',
                flush=True,
            )


if __name__ == '__main__':
    a = argparse.ArgumentParser(description='Losses on fresh rows by learning rate.')
    a.add_argument('--profile', default='tiny', help='name of a profile or path of a TOML file')
    a.add_argument('--seed', type=int, default=100, help='of the rows and the training')
    a = a.parse_args()
    main(a.profile, a.seed)
