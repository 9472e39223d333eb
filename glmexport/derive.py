"""Bundle -> pass -> new bundle: what the pass leaves alone is hard-linked, the old bundle is never written to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from glmexport import names
from glmexport.bundle import Bundle, check_files
from glmexport.bundle_writer import check_output
from glmexport.draft import BundleDraft, Notice, draft_of_bundle
from glmexport.draft_writer import Advance, ignore_advance, write_bundle
from glmexport.errors import BundleError
from glmexport.passes import Pass

MAX_NAMED = 3


def derive(
    bundle: Bundle,
    make_pass: Callable[[BundleDraft], Pass],
    output: Path,
    *,
    notice: Notice,
    force: bool = False,
    copy: bool = False,
    advance: Advance = ignore_advance,
) -> BundleDraft:
    """Write the bundle that a pass makes of `bundle` to `output` and return what was written.

    make_pass: the pass, for the draft of the bundle as it is. copy: unchanged files instead of linking them.
    advance: takes (file, bytes hashed or written).
    Raises BundleError where a file of the bundle is not what its manifest says or the output may not be written, and
    what the pass raises. No error leaves anything behind.
    """
    check_output(output, force=force)
    demand_apart(bundle, output)
    draft = draft_of_bundle(bundle)
    changed = make_pass(draft).apply(draft, notice)  # what it refuses is known before gigabytes are hashed
    demand_intact(bundle, advance)
    write_bundle(changed, output, force=force, copy=copy, advance=advance)
    return changed


def derive_total(bundle: Bundle) -> int:
    """About how many bytes `derive` reports."""
    return 2 * bundle.total_bytes


def demand_apart(bundle: Bundle, output: Path) -> None:
    """Raise BundleError where one of the two directories would lie in the other."""
    source, target = bundle.directory.resolve(), output.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise BundleError(f"{output} and the bundle {bundle.directory} lie in one another; choose another output.")


def demand_intact(bundle: Bundle, advance: Advance) -> None:
    """Raise BundleError where a file is not what the manifest says. advance: takes (file, bytes hashed)."""
    complaints, listed = [], {*bundle.files, names.MANIFEST}  # files that are not are left behind
    for name, complaint in check_files(bundle):
        advance(f"hash {name}", bundle.files[name].bytes if name in bundle.files else 0)
        if complaint and name in listed:
            complaints.append(complaint)
    if complaints:
        more = f" and {len(complaints) - MAX_NAMED} more like it" if len(complaints) > MAX_NAMED else ""
        raise BundleError(
            f"{bundle.directory} is damaged: {' '.join(complaints[:MAX_NAMED])}{more} Copy or split it again."
        )
