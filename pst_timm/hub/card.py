"""The model card: what a person wants to know before using a model. Every number is measured or from the checkpoint."""
import re
import shlex
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence

import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, ModelCardData

from pst_timm.checkpoints import attention_settings, label_names, temperature_of
from pst_timm.checkpoints.reading import Checkpoint
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.markdown import fence, plain, prose

__all__ = ['CITATION', 'Accuracy', 'count_gmacs', 'model_card']

CITATION = """@article{hu2025pyramid,
  title   = {Pyramid Sparse Transformer: Enhancing Multi-Scale Feature Fusion with Dynamic Token Selection},
  author  = {Hu, Junyi and Bai, Tian and Wu, Fengyi and Peng, Zhenming and Zhang, Yi},
  journal = {arXiv preprint arXiv:2505.12772},
  year    = {2025}
}"""

TASK = 'image-classification'
SHOWN_NAMES = 10
HUB_NAME = re.compile(r'[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}', re.ASCII)
MOST_RECIPE = 20_000  # characters


class Accuracy(NamedTuple):
    """A measured accuracy, in percent."""
    top1: float
    top5: Optional[float]
    img_size: int
    crop_pct: float
    interpolation: str
    measured: str
    """How: by validate.py, or while training."""


def _head(name: str, accuracy: Optional[Accuracy], license: str, data_set: Optional[str]) -> ModelCardData:
    """What the Hub reads of a card: tags, licence, data set, and the accuracy as a model index."""
    shown = plain(data_set or 'unnamed')
    results = [
        EvalResult(
            task_type=TASK, dataset_type=shown, dataset_name=shown,
            metric_type='accuracy', metric_name=metric, metric_value=value)
        for metric, value in (('top-1 (%)', accuracy.top1), ('top-5 (%)', accuracy.top5)) if value is not None
    ] if accuracy else None
    return ModelCardData(
        model_name=name if results else None,
        tags=[TASK, 'timm', 'pst_timm', 'pyramid-sparse-transformer'],
        pipeline_tag=TASK,
        library_name='timm',
        license=license,
        # the name of a repository of data on the Hub
        datasets=[data_set] if data_set and HUB_NAME.fullmatch(data_set) else None,
        eval_results=results,
    )


def _attention(settings: Mapping[str, Any]) -> str:
    topk = settings['topk']
    return f'coarse and fine, `topk={topk}`, `{settings["fine_fusion"]}` fusion' if topk else 'coarse alone (`topk=0`)'


def _validate_command(source: str, accuracy: Accuracy, settings: Mapping[str, Any]) -> str:
    words = [
        'pst-timm validate --data-dir PATH', f'--model {source} --pretrained',
        f'--img-size {accuracy.img_size}', f'--crop-pct {accuracy.crop_pct}',
        f'--interpolation {shlex.quote(plain(accuracy.interpolation))}',
    ]
    if settings['topk']:
        words.append(f'--model-kwargs topk={settings["topk"]} fine_fusion={settings["fine_fusion"]}')
    return ' '.join(words)


def _accuracy_section(
        source: str,
        accuracy: Optional[Accuracy],
        settings: Mapping[str, Any],
        data_set: Optional[str],
) -> List[str]:
    if accuracy is None:
        return ['## Accuracy', '', 'Not measured for these weights.', '']
    top5 = '' if accuracy.top5 is None else f'{accuracy.top5:.2f}'
    return [
        '## Accuracy',
        '',
        '| data set | image size | crop | attention | top-1 (%) | top-5 (%) |',
        '|---|---|---|---|---|---|',
        f'| {prose(data_set or "unnamed")} | {accuracy.img_size} | {accuracy.crop_pct} | {_attention(settings)} '
        f'| {accuracy.top1:.2f} | {top5} |',
        '',
        f'Measured {accuracy.measured}. To measure it again:',
        '',
        fence(_validate_command(source, accuracy, settings), 'sh'),
        '',
    ]


def _recipe_section(checkpoint: Checkpoint) -> List[str]:
    weights = ''
    if checkpoint.epoch is not None:
        average = ', as a moving average (EMA)' if checkpoint.ema else ''
        weights = f' The weights are those after epoch {checkpoint.epoch + 1}{average}.'
    settings = _settings(checkpoint)
    if not settings:
        return ['## Training', '', f'How the model was trained did not come with the weights.{weights}', '']
    kind = checkpoint.args.get('dataset')
    dataset = f' --dataset {shlex.quote(plain(kind))}' if kind else ''
    return [
        '## Training',
        '',
        'Save the settings below as `args.yaml` and run',
        '',
        fence(f'pst-timm train --config args.yaml --data-dir PATH{dataset}', 'sh'),
        '',
        f'They are what differs from the defaults; files in them are those that the run began with. With another '
        f'number of loader workers or processes the random augmentation is another one.{weights}',
        '',
        fence(settings, 'yaml'),
        '',
    ]


def _settings(checkpoint: Checkpoint) -> str:
    """The recipe as YAML, empty where there is none, or none that a person would read."""
    try:
        settings = yaml.safe_dump(checkpoint.recipe, sort_keys=True).rstrip() if checkpoint.recipe else ''
    except (yaml.YAMLError, RecursionError, TypeError):
        return ''
    return settings if len(settings) <= MOST_RECIPE else ''


def _usage_section(
        source: str,
        channels: int,
        strides: Sequence[int],
        saved: str,
        named: bool,
        described: bool,
        otherwise: bool,
) -> List[str]:
    size = ', use_test_size=True' if otherwise else ''  # tested at another size or crop than trained
    mode = 'L' if channels == 1 else 'RGB'
    names = [
        "names = model.pretrained_cfg['label_names']",
        *(["words = model.pretrained_cfg['label_descriptions']", 'names = [words[name] for name in names]']
          if described else []),
        'print([(names[i], p) for i, p in zip(classes[0].tolist(), probabilities[0].tolist())])',
    ] if named else ['print(classes, probabilities)']
    return [
        '## Usage',
        '',
        'Install the package `pst_timm` (`pip install .` in a checkout of it). Then, to classify an image:',
        '',
        '```python',
        'import timm, torch',
        'import pst_timm  # registers the architecture with timm',
        'from PIL import Image',
        '',
        f"model = timm.create_model('{source}', pretrained=True).eval()",
        f'transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model{size}))',
        '',
        f"image = transform(Image.open('image.jpg').convert('{mode}')).unsqueeze(0)",
        'with torch.inference_mode():',
        '    probabilities, classes = model(image).softmax(dim=-1).topk(min(5, model.num_classes))',
        *names,
        '```',
        '',
        f'Feature maps at strides {strides[0]} to {strides[-1]}, for detection or segmentation:',
        '',
        '```python',
        f"backbone = timm.create_model('{source}', pretrained=True, features_only=True).eval()",
        'maps = backbone(image)',
        'print([tuple(m.shape) for m in maps])',
        '```',
        '',
        'Image embeddings:',
        '',
        '```python',
        f"encoder = timm.create_model('{source}', pretrained=True, num_classes=0).eval()",
        'embedding = encoder(image)  # (1, features)',
        '```',
        '',
        'Other arguments are those of timm: `num_classes=` for a new classifier, `in_chans=` for other inputs. '
        f'`model.set_topk(8)` switches fine attention on, `model.set_topk(0)` off{saved}.',
        '',
    ]


def model_card(
        repo_id: str,
        checkpoint: Checkpoint,
        model: nn.Module,
        accuracy: Optional[Accuracy] = None,
        data_set: Optional[str] = None,
        license: str = 'apache-2.0',
        source: Optional[str] = None,
        sections: Sequence[str] = (),
) -> str:
    """The README.md of a repository, or of weights that come with the package.

    Args:
        repo_id: Its name.
        checkpoint: Where the weights came from.
        model: The model, with the attention it was measured with.
        accuracy: What was measured, None if nothing was.
        data_set: Name of the data set.
        license: Identifier of the licence of the weights.
        source: What `timm.create_model` takes, the repository if None.
        sections: Further lines of Markdown, before the limits.

    What others chose (names, settings) is shown as text and has no other effect.
    """
    cfg = model.pretrained_cfg
    channels, *size = cfg['input_size']
    settings = attention_settings(model)
    name, names = repo_id.split('/')[-1], label_names(model)
    described = set(names) <= set(cfg.get('label_descriptions') or {})
    classes = f'{model.num_classes}'
    if names:
        shown = ', '.join(map(prose, names[:SHOWN_NAMES]))
        where = f'pretrained_cfg of {source}' if source else 'config.json'
        classes += f': {shown}{f", ... (all in {where})" if len(names) > SHOWN_NAMES else ""}'
    source = source or f'hf-hub:{repo_id}'
    data = f' for {prose(data_set)}' if data_set else ''
    saved = f'; saved with `topk={settings["topk"]}`, `fine_fusion={settings["fine_fusion"]!r}`'
    strides = [level['reduction'] for level in model.feature_info]
    temperature = temperature_of(model)
    calibrated = (
        f'Probabilities are calibrated (T = {temperature:.4g}, in the weights) for images like those that the '
        f'temperature was fitted on.' if temperature else 'Probabilities are not calibrated.')
    made_of = f'the `{model.plain_name}`' if checkpoint.arch == 'backbone_pst' else 'a network'
    if checkpoint.arch == 'pruned':
        made_of = f'a `{model.own_args["arch"]}` with fewer channels,'
    lines = [
        f'# {name}: {checkpoint.arch}{f" trained on {prose(data_set)}" if data_set else ""}',
        '',
        f'An image classifier{data}: `{checkpoint.arch}`, {made_of} whose last two stages are fused by a Pyramid '
        'Sparse Transformer, for [timm](https://github.com/huggingface/pytorch-image-models) with the package '
        '`pst_timm`.',
        '',
        '| | |',
        '|---|---|',
        f'| parameters | {sum(p.numel() for p in model.parameters()):,} |',
        f'| multiply-adds | {count_gmacs(model, cfg["input_size"]):.3f} G for one {size[0]} x {size[1]} image |',
        f'| classes | {classes} |',
        f'| input | {channels} x {size[0]} x {size[1]}, {prose(cfg["interpolation"])}, crop {prose(cfg["crop_pct"])} |',
        f'| mean, std | {_numbers(cfg["mean"])}; {_numbers(cfg["std"])} |',
        f'| attention | {_attention(settings)} |',
        '',
        *_accuracy_section(source, accuracy, settings, data_set),
        *_usage_section(
            source, channels, strides, saved, bool(names), described,
            bool(accuracy and (accuracy.img_size, accuracy.crop_pct) != (size[0], cfg['crop_pct']))),
        *sections,
        *_recipe_section(checkpoint),
        '## Limits',
        '',
        f'The model knows its {model.num_classes} classes and gives one of them for every image, whatever it shows. '
        f'Its accuracy holds for images like those it was measured on, at the size given above; for others, measure it '
        f'first. {calibrated} A model trained with coarse attention alone need not gain from fine '
        'attention: validate with both. Nothing was done against biases of the data it learned from.',
        '',
        '## Licence',
        '',
        f'The weights: {prose(license)}. The package `pst_timm`: Apache-2.0. The data set has terms of its own.',
        '',
        '## Citation',
        '',
        'The method is that of',
        '',
        '```bibtex',
        CITATION,
        '```',
        '',
    ]
    return f'---\n{_head(name, accuracy, license, data_set)}\n---\n' + '\n'.join(lines)


def _numbers(values: Sequence[float]) -> str:
    return ', '.join(f'{v:g}' for v in values)
