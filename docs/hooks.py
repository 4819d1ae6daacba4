"""The site as the repository has it: README is its first page, and links to sources lead to copies of them."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
RELATIVE = re.compile(r"\]\((?!https?:|#)([^)]+)\)")
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)\)")


def as_in_docs(link):
    """A link of a page that lies beside docs/, as a page inside it has it."""
    path = link[1]
    return f"]({path.removeprefix('docs/') if path.startswith('docs/') else f'../{path}'})"


def on_files(files, config):
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=RELATIVE.sub(as_in_docs, (ROOT / source).read_text())))
    for page in [file for file in files if file.is_documentation_page()]:
        for name in OUTSIDE.findall(page.content_string):
            if name not in PAGES and files.get_file_from_path(copy_of(name)) is None:
                files.append(File.generated(config, copy_of(name), content=file_of(name).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    return OUTSIDE.sub(lambda link: f"]({link[1] if link[1] in PAGES else copy_of(link[1])})", markdown)


def file_of(name):
    """A file, or the first module of a folder."""
    path = ROOT / name
    return sorted(path.glob("*.py"))[0] if path.is_dir() else path


def copy_of(name):
    return f"sources/{file_of(name).relative_to(ROOT)}.txt"
