"""HTML pages from the packages' templates."""

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def template(package: str, folder: str, name: str) -> Template:
    """A package's template: what is put into it is escaped, and what it lacks is an error."""
    environment = Environment(
        loader=PackageLoader(package, folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
