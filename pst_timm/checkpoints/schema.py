"""What a file may say of its weights: the names, and a rule for each. Strict JSON."""
import json
from argparse import Namespace
from os import PathLike
from typing import Any, Dict, List, Mapping, Union

from pst_timm.utils.errors import PSTError

from . import rules

__all__ = ['ARGS', 'CONFIG', 'FACTS', 'PRETRAINED_CFG', 'check_budget', 'check_facts', 'parse_json']

MOST_JSON = 16 * 2 ** 20  # characters; a config.json with the names of 22,000 classes has one million
MOST_NODES = 1_000_000  # values in all that a file says
MOST_TEXT = 64 * 2 ** 20  # characters in all of these
MOST_DEPTH = 20

# what of timm's PretrainedCfg is a fact about weights; where they are to be had (url, file, hf_hub_id, custom_load
# and the like) is never taken from a file
PRETRAINED_CFG = {
    'input_size': rules.size,
    'test_input_size': rules.size,
    'min_input_size': rules.size,
    'fixed_input_size': rules.flag,
    'interpolation': rules.interpolation,
    'crop_pct': rules.CROP,
    'test_crop_pct': rules.CROP,
    'crop_mode': rules.choice('center', 'squash', 'border'),
    'mean': rules.either(rules.MEANS, rules.real(-1e6, 1e6)),
    'std': rules.either(rules.STDS, rules.real(1e-6, 1e6)),
    'num_classes': rules.whole(0, rules.MOST_CLASSES),
    'label_offset': rules.whole(0, rules.MOST_CLASSES),
    'label_names': rules.names,
    'label_descriptions': rules.mapping({}, rules.text(10_000)),
    'pool_size': rules.each(rules.whole(1, rules.MOST_PIXELS), 1, 3),
    'test_pool_size': rules.each(rules.whole(1, rules.MOST_PIXELS), 1, 3),
    'first_conv': rules.MODULE,
    'classifier': rules.MODULE,
    'license': rules.text(),
    'description': rules.text(10_000),
    'origin_url': rules.text(1000),
    'paper_name': rules.text(1000),
    'paper_ids': rules.either(rules.text(1000), rules.each(rules.text(1000), 0, 100)),
    'notes': rules.each(rules.text(10_000), 0, 1000),
    # ours: what the logits were divided by for calibrated probabilities, in the weights
    'temperature': rules.real(1e-3, 1e3),
}

# the arguments of a run that are used again; all others are carried along as plain values
ARGS = {
    'model': rules.text(4096),
    'gp': rules.text(50, r'\w*'),
    'model_kwargs': rules.mapping({}, rules.plain),
    'pretrained': rules.flag,
    'img_size': rules.SIDES,
    'input_size': rules.size,
    'in_chans': rules.whole(1, rules.MOST_CHANNELS),
    'chans': rules.whole(1, rules.MOST_CHANNELS),
    'num_classes': rules.whole(-1, rules.MOST_CLASSES),
    'mean': rules.MEANS,
    'std': rules.STDS,
    'crop_pct': rules.CROP,
    'crop_mode': PRETRAINED_CFG['crop_mode'],
    'interpolation': rules.either(rules.interpolation, rules.choice('')),
    'dataset': rules.text(1000),
    'data_dir': rules.text(4096),
    'eval_metric': rules.text(),
    'model_ema': rules.flag,
    'model_ema_force_cpu': rules.flag,
}

# the arguments of a detector; those of its trunk and neck are checked where it is opened
DETECTOR = {
    'kind': rules.choice('fcos', 'retinanet', 'retinanet_v2'),
    'trunk': rules.text(200),
    'neck': rules.choice('pst', 'pan', 'fpn'),
    'num_classes': rules.whole(1, 100_000),
    'neck_width': rules.whole(8, 4096),
    'levels': rules.each(rules.whole(2, 128), 2, 4),
    'extra_levels': rules.whole(0, 2),
    'head_convs': rules.whole(0, 16),
    'img_size': rules.whole(32, rules.MOST_PIXELS),
    'topk': rules.whole(0, rules.MOST_PIXELS ** 2),
    'fine_fusion': rules.choice('gate', 'joint'),
    'train_topk': rules.whole(0, rules.MOST_PIXELS ** 2),
    'train_fine_prob': rules.real(0, 1),
    'neck_kwargs': rules.mapping({}, rules.plain),
    'trunk_kwargs': rules.mapping({}, rules.plain),
    'score_thresh': rules.real(0, 1),
    'nms_thresh': rules.real(0, 1),
    'detections_per_img': rules.whole(1, 10_000),
    'topk_candidates': rules.whole(1, 100_000),
}

# all that is known of weights beside themselves, as `Checkpoint` has it
FACTS = {
    'arch': rules.text(4096),
    'args': rules.mapping(ARGS, rules.plain),
    'model_args': rules.mapping({}, rules.plain),
    'detector': rules.mapping(DETECTOR),
    'pretrained_cfg': rules.mapping(PRETRAINED_CFG),
    'recipe': rules.mapping({}, rules.plain),
    'epoch': rules.whole(-1, 10 ** 9),
    'metric': rules.measured,
    'ema': rules.flag,
}
# what has to be so far right in a config.json that timm can take it apart
CONFIG = {
    'architecture': rules.text(200),
    'num_classes': rules.whole(0, rules.MOST_CLASSES),
    'label_names': rules.names,
    'label_descriptions': PRETRAINED_CFG['label_descriptions'],
    'global_pool': rules.text(50, r'\w*'),
    'model_args': rules.mapping({}, rules.plain),
    'pretrained_cfg': rules.mapping(PRETRAINED_CFG),
    'labels': rules.names,
    # as old versions have them, without a `pretrained_cfg`
    **PRETRAINED_CFG,
}


def check_facts(
        source: Union[str, PathLike],
        facts: Any,
        schema: Mapping[str, rules.Rule] = FACTS,
        about: str = 'its weights',
) -> Dict[str, Any]:
    """What a file says of its weights, as values that fit.

    Args:
        source: The file, for the message.
        facts: What it says: all that may be in a `Checkpoint` but path and weights.
        schema: The rules by name: `FACTS`, or `CONFIG` for a whole config.json.
        about: What it tells of, for the message.

    Returns:
        A copy, without what is not set.

    Raises:
        PSTError: If a name is unknown or a value does not fit; names the file, the key and what was expected.
    """
    try:
        if not isinstance(facts, dict):
            raise rules.Unfit(f'a mapping of names to values, not a {type(facts).__name__}')
        unknown = next((k for k in facts if k not in schema), None) if schema is FACTS else None
        if unknown is not None:
            raise rules.Unfit(f'one of {", ".join(schema)}', (rules.short(unknown),))
        check_budget(facts)
        checked = {k: v for k, v in rules.mapping(schema)(facts).items() if v is not None}
        if 'pretrained_cfg' in checked:  # a null there is as good as nothing said
            checked['pretrained_cfg'] = {k: v for k, v in checked['pretrained_cfg'].items() if v is not None}
        return checked
    except rules.Unfit as e:
        at = rules.printable('.'.join(e.path).replace('.[', '[')[:200])
        raise PSTError(
            f'{source}: what it tells about {about} is garbled{f" at {at}" if at else ""}: expected {e.expected}'
            f'{rules.shown(facts, e.path)}. Use another file.') from None


def check_budget(value: Any) -> None:
    """Make sure that values are few, and not nested deeply; a list within itself is both.

    A tensor is one value. What is shared counts as often as it is there.

    Raises:
        rules.Unfit: If they are not.
    """
    left, text = MOST_NODES, MOST_TEXT
    level: List[Any] = [value]
    for _ in range(MOST_DEPTH):
        left -= len(level)
        text -= sum(len(v) for v in level if isinstance(v, str))
        if left < 0 or text < 0:
            raise rules.Unfit(f'at most {MOST_NODES} values, of {MOST_TEXT} characters')
        below: List[Any] = []
        for v in level:
            if isinstance(v, Namespace):
                v = vars(v)
            if isinstance(v, (dict, list, tuple)):
                below += v.values() if isinstance(v, dict) else v
            if len(below) > left:
                raise rules.Unfit(f'at most {MOST_NODES} values, of {MOST_TEXT} characters')
        level = below
    if level:
        raise rules.Unfit(f'values nested at most {MOST_DEPTH} deep')


def parse_json(text: Union[str, bytes], source: Union[str, PathLike]) -> Any:
    """The value of a JSON text from a file, strictly: no key twice, no NaN, no numbers without end.

    Raises:
        PSTError: If it is none; names the source.
    """
    def pairs(found: list) -> dict:
        keys = [k for k, _ in found]
        if len(set(keys)) < len(keys):
            raise ValueError(f'the key {rules.short(next(k for k in keys if keys.count(k) > 1))} is there twice')
        return dict(found)

    def constant(name: str) -> None:
        raise ValueError(f'{name} is no number')

    try:
        if len(text) > MOST_JSON:
            raise ValueError(f'more than {MOST_JSON >> 20} MiB')
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        reason = 'nested too deeply' if isinstance(e, RecursionError) else rules.short(str(e))
        raise PSTError(
            f'{source} is not JSON as it should be ({reason}). Use another file, or write it again.') from None
