"""What the site has beside the files in docs/: the README as its first page, the API, and files that pages link to.

Links in the pages are those that work on GitHub. Where one leads out of docs/, the file (or every file of a folder)
gets a page of the site, and the link leads there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent.parent
MOVED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
API = {  # a page each, and the modules on it
    "midskip": ["midskip"],
    "policies": ["midskip.policies"],
    "regularizers": ["midskip.regularizers"],
    "convert": ["midskip.convert", "midskip.convert.skip_middle"],
    "budget": ["midskip.budget.calibration", "midskip.budget.calibrate", "midskip.budget.monitor"],
    "cost": ["midskip.cost.counting", "midskip.cost.flops"],
    "data": ["midskip.data"],
    "train": ["midskip.train"],
    "retrofit": ["midskip.retrofit"],
    "sweep": ["midskip.sweep"],
    "frontier": ["midskip.frontier"],
    "report": ["midskip.report"],
    "testing": ["midskip.testing"],
}
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
FENCED = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are no files of docs/."""
    for source, place in MOVED.items():
        _add(files, config, place, (ROOT / source).read_text(encoding="utf-8"))
    for name, modules in API.items():
        title = name if name == "midskip" else f"midskip.{name}"
        _add(files, config, f"api/{name}.md", f"# {title}\n\n" + "\n\n".join(f"::: {module}" for module in modules))
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        file = waiting.pop()
        for target in _targets(file.content_string, _origin(file.src_uri)):
            place = _place(target)
            if place.startswith("source/") and files.get_file_from_path(place) is None:
                waiting.append(_add(files, config, place, _shown(target)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **more: Any) -> str:
    """Turns the links of GitHub into those of the site."""
    place = page.file.src_uri
    origin = _origin(place)

    def moved(link: re.Match[str]) -> str:
        target = _target(link[2], origin)
        if target is None:
            return link[0]
        return f"{link[1]}{posixpath.relpath(_place(target), posixpath.dirname(place) or '.')}{link[3] or ''}{link[4]}"

    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in FENCED.split(markdown))


def _add(files: Files, config: Any, place: str, text: str) -> File:
    level = InclusionLevel.NOT_IN_NAV if place.startswith("source/") else InclusionLevel.INCLUDED
    file = File.generated(config, place, content=text, inclusion=level)
    files.append(file)
    return file


def _origin(place: str) -> str:
    """Where a page of the site stands in the repository."""
    for source, moved in MOVED.items():
        if moved == place:
            return source
    return place.removeprefix("source/") if place.startswith("source/") else f"docs/{place}"


def _place(target: str) -> str:
    """Where a file of the repository, or a folder, stands in the site."""
    if target in MOVED:
        return MOVED[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"source/{target}" if target.endswith(".md") else f"source/{target}.md"


def _targets(markdown: str, origin: str) -> list[str]:
    text = "".join(part for part in FENCED.split(markdown) if not part.startswith("```"))
    return [target for link in LINK.finditer(text) if (target := _target(link[2], origin)) is not None]


def _target(link: str, origin: str) -> str | None:
    """The file or folder of the repository that a link leads to; None if it leads elsewhere, or nowhere."""
    if "://" in link or link.startswith(("/", "mailto:")):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return target if (ROOT / target).exists() else None  # mkdocs tells of links that lead nowhere


def _shown(target: str) -> str:
    """A file as a page: Markdown as it is, anything else as code. Of a folder, each file."""
    path = ROOT / target
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    files = sorted(file for file in path.rglob("*") if file.suffix in LANGUAGES) if path.is_dir() else [path]
    parts = [f"# {target}"]
    for file in files:
        text = file.read_text(encoding="utf-8").rstrip()
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
        heading = [f"## {file.relative_to(path)}"] if path.is_dir() else []
        parts += [*heading, f"{fence}{LANGUAGES.get(file.suffix, 'text')}\n{text}\n{fence}"]
    return "\n\n".join(parts) + "\n"
