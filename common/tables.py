"""Tables on the disk (Hugging Face datasets, Arrow files): made in parts that survive a kill, read without
memory.

    rows -> function, a batch at a time -> NAME-00000.arrow, NAME-00001.arrow, ... -> one memory-mapped
    Dataset

A part is written beside its place and renamed, so what is there is whole: stop at any moment, and the same
call goes on with the parts that are missing. Under torchrun every rank makes other parts, and all of them
read the result.
"""

import functools
import time
import warnings

import datasets
import pyarrow as pa
from datasets import Dataset
from datasets.table import MemoryMappedTable, concat_tables
from tqdm import tqdm

from common import parallel
from common.checkpoint import save_atomically

datasets.disable_progress_bars()
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream: a file that was cut lacks it
RECORD = 1 << 25  # bytes of a record batch, of which a file is made; a million small ones would open slowly


def map_in_parts(rows, function, features, folder, name, per_part=4096, batch=64, row_bytes=1 << 12):
    """A Dataset of what function(columns, numbers) makes of the rows, kept in the folder.

    Args:
        function: takes {column: list} of up to `batch` rows, and their numbers; returns {column: list}. It is
        not
            called for parts that are there.
        per_part: so many rows make a file. row_bytes: about so much is kept of a row.
    """
    paths = [folder / f"{name}-{k:05d}.arrow" for k in range(-(-len(rows) // per_part))]
    missing = [k for k, path in enumerate(paths) if not is_whole(path)]
    for k in missing:
        if paths[k].is_file():
            warnings.warn(f"{paths[k]} is damaged; making it again", stacklevel=2)
    parallel.wait()  # all have looked before the first one writes
    if parallel.rank() == 0:
        for left in folder.glob("tmp*"):  # by a map() that was killed
            if time.time() - left.stat().st_mtime > 24 * 3600:
                left.unlink()
    mine = missing[parallel.rank() :: parallel.world()]
    bar = tqdm(total=sum(min(per_part, len(rows) - k * per_part) for k in mine), unit=" rows", mininterval=1,
               desc=name, disable=None if parallel.rank() == 0 and mine else True)  # fmt: skip
    record = max(1, RECORD // row_bytes // batch) * batch
    for k in mine:
        start, stop = k * per_part, min(len(rows), (k + 1) * per_part)

        def in_batches(columns, numbers, start=start):
            made = {column: [] for column in features}
            for at in range(0, len(numbers), batch):
                some = slice(at, at + batch)
                absolute = [start + number for number in numbers[some]]
                for column, values in function({c: v[some] for c, v in columns.items()}, absolute).items():
                    made[column] += values
                bar.update(len(absolute))
            return made

        save = functools.partial(save_map, rows.select(range(start, stop)), in_batches, features, record)
        save_atomically(save, paths[k])
    bar.close()
    parallel.wait()
    return open_tables(paths)


def save_map(rows, function, features, record, path):
    """rows.map(function) as the file `path`, with a fingerprint that is given: datasets would find one by
    pickling the function, and the networks with it."""
    rows.map(function, with_indices=True, batched=True, batch_size=record, features=features,
             remove_columns=rows.column_names, cache_file_name=str(path), load_from_cache_file=False,
             new_fingerprint=path.stem.strip("."))  # fmt: skip


def is_whole(path):
    """Whether a file is there and has its end."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - len(END)))
        return file.read() == END


def open_tables(paths):
    """The rows of Arrow files, one after the other, memory-mapped. Raises SystemExit when one is missing or
    damaged."""
    parts = []
    for path in paths:
        try:
            if not is_whole(path):
                raise OSError("it is missing, or its end is")
            parts.append(MemoryMappedTable.from_file(str(path)))
        except (OSError, ValueError) as error:
            problem = f"{path} is damaged ({error}): delete it and start again, which makes it alone."
            raise SystemExit(problem) from error
    # as concatenate_datasets() of Dataset.from_file(), which takes seconds for hundreds of files
    return Dataset(concat_tables(parts), fingerprint=path.parent.name).with_format("arrow")


def open_folder(folder, name):
    """What map_in_parts() has made. Raises SystemExit when a part is missing between others, or damaged."""
    found = sorted(folder.glob(f"{name}-*.arrow"))
    return open_tables([folder / f"{name}-{k:05d}.arrow" for k in range(max(1, len(found)))])


def save_table(columns, features, path):
    """{column: list or array} as one file."""
    content = pa.table(columns, schema=features.arrow_schema)

    def save(beside):
        with open(beside, "wb") as file, pa.ipc.new_stream(file, content.schema) as stream:
            stream.write_table(content, max_chunksize=1 << 16)

    save_atomically(save, path)


def column(rows, name):
    """A whole column, as pyarrow has it: nothing is read but its own bytes."""
    return rows.data.column(name)
