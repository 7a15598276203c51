"""The files `temper new` starts from; $name, $slug and $title are filled in."""

__all__: list[str] = []
