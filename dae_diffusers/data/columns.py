"""Which columns of a data set hold the images and the labels, and what the labels are called."""

import datasets

from dae_diffusers.errors import UserError


def find_image_column(rows: datasets.Dataset | datasets.IterableDataset, name: str | None) -> str:
    kinds = (datasets.Image, datasets.Array2D, datasets.Array3D)
    image_columns = [column for column, feature in rows.features.items() if isinstance(feature, kinds)]
    if name is None and image_columns:
        return image_columns[0]
    if name is None or name not in rows.features:
        raise UserError(
            f"`--image_column` is {name!r}, but the columns are {list(rows.features)}, those with images {image_columns}."
        )
    if name not in image_columns and not isinstance(rows.features[name], (datasets.List, datasets.LargeList)):
        raise UserError(
            f"`--image_column` {name!r} holds {rows.features[name]}, not images; those are {image_columns}."
        )
    return name


def find_label_column(
    rows: datasets.Dataset | datasets.IterableDataset, name: str | None, image_column: str
) -> str | None:
    if name == "none":
        return None
    if name is None:
        columns = [column for column, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(columns) > 1:
            raise UserError(f"several columns hold labels: {columns}. Choose one with `--label_column`, or `none`.")
        return columns[0] if columns else None
    if name not in rows.features or name == image_column:
        raise UserError(f"`--label_column` {name!r} is not among the columns {list(rows.features)}; `none`: no labels.")
    return name


def label_names(train, validation, column: str | None) -> tuple[dict[int, str] | None, dict | None]:
    """Names of the classes by id, and the id of each value of the column where it does not hold ids already."""
    if column is None:
        return None, None
    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names)), None
    if isinstance(feature, (datasets.List, datasets.LargeList, dict)):
        raise UserError(
            f"`--label_column` {column!r} holds {feature}, not one class for each image; `none`: no labels."
        )
    values = set(train[column]) | (set(validation[column]) if column in validation.features else set())
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        if max(values) >= max(10_000, 100 * len(values)):
            raise UserError(
                f"`--label_column` {column!r} holds {len(values)} different integers, up to {max(values)}; labels are numbers from "
                "0 without large gaps. Number the classes anew, or train without labels (`--label_column none`)."
            )
        return {index: str(index) for index in range(max(values) + 1)}, None
    if all(isinstance(value, str) for value in values):
        return dict(enumerate(sorted(values))), {value: index for index, value in enumerate(sorted(values))}
    raise UserError(f"`--label_column` {column!r} must hold integers or strings without gaps, but holds {feature}.")


def label_ids(values: list, value2id: dict | None, id2label: dict[int, str], column: str) -> list[int]:
    ids = [value2id[value] for value in values] if value2id is not None else list(values)
    bad = next((value for value in ids if value is None or not 0 <= value < len(id2label)), 0)
    if bad is None or bad != 0:
        raise UserError(
            f"`--label_column` {column!r} holds {bad}, but labels must lie in 0..{len(id2label) - 1}. "
            "Remove the unlabelled rows or train without labels (`--label_column none`)."
        )
    return ids
