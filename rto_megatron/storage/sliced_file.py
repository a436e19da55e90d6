"""A file for large writes out of mapped pages."""

import io
import os
from collections.abc import Buffer

_SLICE = 1 << 20
_REGION = 1 << 25


class SlicedFile(io.FileIO):
    """Writes everything it is given, a MiB at a time.

    One large write out of mapped pages takes twice as long, and its fsync too: the kernel faults the pages in one by
    one between its copies.

    Example:
        with SlicedFile(path, "wb") as file: file.write(content)
    """

    def write(self, data: Buffer, /) -> int:
        """Returns when all of `data` is written; its length in bytes."""
        view = memoryview(data).cast("B")
        done, at = 0, self.tell()
        while done < len(view):
            # Up to a boundary of the file, so that no page is written twice.
            done += super().write(view[done : done + _SLICE - (at + done) % _SLICE])
            if (at + done) % _REGION == 0:
                # Has the disk begin with these pages, which stay in memory: they are dirty.
                os.posix_fadvise(self.fileno(), at + done - _REGION, _REGION, os.POSIX_FADV_DONTNEED)
        return done

    def close_synced(self) -> None:
        """Closes the file once it is on the disk."""
        os.fsync(self.fileno())
        self.close()
