"""HTML pages from the packages' templates; all begin with ``head.html``, which lies beside this module."""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template


def template(package: str, folder: str, name: str) -> Template:
    """A package's template: what is put into it is escaped, and what it lacks is an error."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, folder), PackageLoader("tiling", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
