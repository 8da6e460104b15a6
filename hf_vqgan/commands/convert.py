"""
Convert a published VQ tokenizer to hf_vqgan, or to another project's format.

    hf-vqgan convert logs/vqgan/last.ckpt tokenizer                    # then from_pretrained
    hf-vqgan convert user/repository/vq_ds16_c2i.pt tokenizer          # from the Hub
    hf-vqgan convert model.ckpt tokenizer --format ibq --config ibq.yaml
    hf-vqgan convert tokenizer exported --to taming                    # and back

docs/checkpoints.md says what loads and what differs.
"""

import argparse
from pathlib import Path

from ..conversion.convert import EXPORTS, FAMILIES, convert
from ..training.arguments import errors_in_one_line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Checkpoint file or folder, or owner/name[/folder][/file] on the Hub.")
    parser.add_argument("out", type=Path, help="Folder to write: new or empty.")
    parser.add_argument("--format", default="auto", choices=("auto", *FAMILIES), help="Default: by the keys.")
    parser.add_argument("--to", choices=tuple(EXPORTS), help="Another project's format. Default: hf_vqgan's own.")
    parser.add_argument("--config", type=Path, help="The original's config. Default: one beside the checkpoint.")
    parser.add_argument(
        "--weights", default="auto", choices=("auto", "raw", "ema"), help="Default: what the original evaluates."
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    with errors_in_one_line():
        model = convert(**vars(arguments))
    config = model.config
    print(
        f"{arguments.out}: f{config.downsample_factor}, {config.num_vq_embeddings} codes of {config.vq_embed_dim} "
        f"numbers, quantizer {config.quantizer}, {model.num_parameters() / 1e6:.1f} M parameters."
    )
