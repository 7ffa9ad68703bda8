"""The command line: `pst-timm list`, `pst-timm train ...`, `pst-timm validate ...`."""
import json
import sys
from typing import List, Optional, Sequence

from timm.utils import setup_default_logging

__all__ = ['main', 'train_main', 'validate_main']

USAGE = """usage: pst-timm COMMAND [flags]

commands:
  list       the models of this package
  train      train a model (pst-timm train --help)
  validate   evaluate models (pst-timm validate --help)
  benchmark  measure models and the attention on this machine (pst-timm benchmark --help)
  study      train and evaluate a grid of models and seeds (pst-timm study --help)
  report     make the tables and plots of README and docs from results (pst-timm report --help)
  visualize  draw what PST looks at in an image (pst-timm visualize --help)
  export     write a model for deployment (pst-timm export --help)
  convert    training checkpoint to safetensors and back (pst-timm convert --help)
  publish    put a checkpoint on the Hub (pst-timm publish --help)
"""


def train_main(argv: Optional[Sequence[str]] = None, prog: str = 'train.py') -> int:
    """Train from the words of a command line (`sys.argv` if None); returns the exit code."""
    from pst_timm.engine import EngineError, parse_train_args, train

    try:
        args = parse_train_args(argv, prog)
        setup_default_logging()
        result = train(args)
    except EngineError as e:
        return _fail(prog, e)
    if result.best_checkpoint is not None:
        print(f'Best checkpoint: {result.best_checkpoint}')
    return 0


def validate_main(argv: Optional[Sequence[str]] = None, prog: str = 'validate.py') -> int:
    """Evaluate from the words of a command line (`sys.argv` if None); returns the exit code."""
    from pst_timm.engine import EngineError, parse_validate_args, validate
    from pst_timm.tools.table import differing_columns, format_table

    try:
        args = parse_validate_args(argv, prog)
        setup_default_logging()
        results = validate(args)
    except EngineError as e:
        return _fail(prog, e)
    if len(results) > 1:
        print(format_table(differing_columns(results)))
    # the marker that timm's own tools look for
    print(f'--result\n{json.dumps(results[0] if len(results) == 1 else results, indent=4)}')
    return 0


def list_main() -> int:
    """Print the models of this package."""
    from pst_timm.tools.table import bundled_weights, format_table, model_rows

    print(format_table(model_rows()))
    for record in bundled_weights():
        print(f'\n{record["weights"]}, in the package: {record["top1"]:.2f}% top-1 of {record["images"]} images '
              f'({record["data_set"]}) at {record["img_size"]} px.\nTo make it again: {record["command"]}')
    return 0


def _fail(prog: str, error: Exception) -> int:
    print(f'{prog}: error: {error}', file=sys.stderr)
    return error.exit_code


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; returns the exit code."""
    words: List[str] = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else ''
    if command in ('', '-h', '--help'):
        print(USAGE, end='')
        return 0 if command else 2
    if command == 'list':
        return list_main()
    if command == 'train':
        return train_main(words[1:], 'pst-timm train')
    if command == 'validate':
        return validate_main(words[1:], 'pst-timm validate')
    if command == 'benchmark':
        from pst_timm.tools.benchmark import main as benchmark_main
        return benchmark_main(words[1:])
    if command == 'study':
        from pst_timm.tools.study import main as study_main
        return study_main(words[1:])
    if command == 'report':
        from pst_timm.tools.report import main as report_main
        return report_main(words[1:])
    if command == 'visualize':
        from pst_timm.tools.visualize import main as visualize_main
        return visualize_main(words[1:])
    if command == 'export':
        from pst_timm.tools.export import main as export_main
        return export_main(words[1:])
    if command == 'convert':
        from pst_timm.hub.commands import convert_main
        return convert_main(words[1:])
    if command == 'publish':
        from pst_timm.hub.commands import publish_main
        return publish_main(words[1:])
    print(f'pst-timm: unknown command {command!r}.\n{USAGE}', end='', file=sys.stderr)
    return 2


if __name__ == '__main__':
    sys.exit(main())
