"""`pst-timm list`: the models of this package and the weights that come with it."""
import json
from typing import Any, Dict, List, Optional, Sequence

from .common import ArgumentParser, run

__all__ = ['bundled_weights', 'main', 'model_rows']


def bundled_weights() -> List[Dict[str, Any]]:
    """Records of the weights that come with the package: tag, data set, accuracy in percent, command to make them.

    Weights that have been made and have no entry in `default_cfgs` yet are left out.
    """
    import timm

    from pst_timm.models.resnet_pst import WEIGHTS

    known = timm.list_pretrained()
    records = [json.loads(path.read_text()) for path in sorted(WEIGHTS.glob('*.json'))]
    return [record for record in records if record['weights'] in known]


def model_rows() -> List[Dict[str, Any]]:
    """One row per model of this package: parameters at 1000 classes, GMACs, input size, published weights."""
    import timm
    import torch

    from pst_timm.utils.cost import count_gmacs

    rows = []
    for name in timm.list_models('*_pst', exclude_filters='backbone_pst'):
        # no memory is touched, only shapes are followed
        with torch.device('meta'):
            model = timm.create_model(name)
        size = model.default_cfg['input_size']
        tags = [m.split('.', 1)[1] for m in timm.list_pretrained(f'{name}.*')]
        rows.append(dict(
            model=name,
            parameters=f'{sum(p.numel() for p in model.parameters()):,}',
            GMACs=f'{count_gmacs(model, size):.3f}',
            input=size[-1],
            weights=', '.join(tags) or 'not yet trained',
        ))
    return rows


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm list`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm list', description='Show the models of this package and the weights that come with it.')
    parser.parse_args(argv)
    return run(parser.prog, _list)


def _list() -> None:
    from pst_timm.utils.tables import format_table

    print(format_table(model_rows()))
    for record in bundled_weights():
        print(f'\n{record["weights"]}, in the package: {record["top1"]:.2f}% top-1 of {record["images"]} images '
              f'({record["data_set"]}) at {record["img_size"]} px.\nTo make it again: {record["command"]}')
