"""What a node may change about its own data: the names of its fields, and the template."""

from string import Formatter

from peerturb.errors import DataError
from peerturb.spec import ObjectiveSpec
from peerturb_node.settings import NodeSettings


def local_objective(objective: ObjectiveSpec, settings: NodeSettings) -> ObjectiveSpec:
    """Return the run's objective as this node's data need it. Labels, lengths and kind stay the run's.

    Raises:
        DataError: a template is wrong, or a rename names no field of the template.
    """
    template = objective.template if settings.template is None else settings.template
    used: set[str] = set()
    changes = {
        "template": _renamed(template, settings.fields, used),
        "completion": _renamed(objective.completion, settings.fields, used),
    }
    if objective.kind in ("labels", "classes"):
        used.add(objective.label_field)
        changes["label_field"] = settings.fields.get(objective.label_field, objective.label_field)
    unused = sorted(set(settings.fields) - used)
    if unused:
        raise DataError(
            f"`fields` renames {unused[0]!r}, which the run does not use; it uses {', '.join(sorted(used)) or 'none'}"
        )
    return objective.model_copy(update=changes)


def _renamed(template: str, names: dict[str, str], used: set[str]) -> str:
    """Return the template with its fields renamed, adding to `used` the fields it has."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"the template {template!r} is wrong: {error}; write {{{{ and }}}} for braces") from error
    pieces = []
    for literal, field, form, conversion in parts:
        pieces.append(literal.replace("{", "{{").replace("}", "}}"))
        if field is None:
            continue
        used.add(field)
        # What a field may look like is `peerturb.zo.data`'s to judge: hand on whatever stood there.
        tail = (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        pieces.append("{" + names.get(field, field) + tail + "}")
    return "".join(pieces)
