"""The two pipelines are files of their own, so that each travels alone: what they have in common is written twice, and equal."""

import ast
from pathlib import Path

PIPELINES = Path(__file__).resolve().parents[1] / "pipelines"
# The same in name and promise, and not in code: they concern the models, or arguments that only one has.
OWN = {
    "__init__",
    "__call__",
    "__setattr__",
    "from_pretrained",
    "save_pretrained",
    "null_class",
    "call_defaults",
    "_check_choices",
}


def functions(name: str, pipeline_class: str) -> dict[str, str]:
    """Name to source, docstring and decorators included; comments apart."""
    source = (PIPELINES / name).read_text(encoding="utf-8").replace(pipeline_class, "Pipeline")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.unparse(node) for node in nodes}


def test_common_parts_of_the_two_pipelines_are_equal():
    dit = functions("dae_dit.py", "DAEDiTPipeline")
    vqgan = functions("dae_vqgan.py", "DAEVQGANPipeline")
    common = (dit.keys() & vqgan.keys()) - OWN
    assert {"labels", "get_label_ids", "_label_id", "from_pipe", "_to_output", "_settings_of"} <= common
    for name in sorted(common):
        assert dit[name] == vqgan[name], f"`{name}` differs: change both files, or give one of them another name"
