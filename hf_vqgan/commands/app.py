"""
A page to play with a trained VQ-GAN: see an image's codes, edit them, walk between two images, sample a pipeline.

    hf-vqgan app runs/quickstart                                          # then open the address it prints
    hf-vqgan app user/model other/model --pipeline runs/diffusion
    hf-vqgan app user/model --pipeline user/pipeline --space space        # the files of a Hugging Face Space

Models and pipelines are Hub names or folders. In the page, others can be named as long as it is served to this machine
alone. docs/app.md says more. Needs gradio: pip install "hf_vqgan[app]"
"""

import argparse
import ipaddress
import sys
from pathlib import Path

from ..files.sources import check_source
from ..training.arguments import errors_in_one_line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="Hub names or folders of models.")
    parser.add_argument("--pipeline", nargs="+", default=[], help="Hub names or folders of pipelines to sample.")
    parser.add_argument("--server_name", default="127.0.0.1", help="Address to listen at. Default: %(default)s.")
    parser.add_argument("--server_port", type=int, help="Default: the first free one from 7860.")
    parser.add_argument("--space", type=Path, help="Folder to write: new or empty. Nothing is served then.")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    try:
        from ..app.page import launch, make_page, write_space
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        sys.exit(f'{Path(sys.argv[0]).name}: error: gradio is not installed: pip install "hf_vqgan[app]"')
    with errors_in_one_line():
        local = arguments.server_name == "localhost" or ipaddress.ip_address(arguments.server_name).is_loopback
        if arguments.space:
            write_space(arguments.space, arguments.models, arguments.pipeline)
        else:
            for name in (*arguments.models, *arguments.pipeline):
                check_source(name)
            page = make_page(arguments.models, arguments.pipeline, any_name=local)
            launch(page, server_name=arguments.server_name, server_port=arguments.server_port)
