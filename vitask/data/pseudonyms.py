"""Names that could be a person's, such as a file's or a patient's, as digests.

Records and pages may be published. They hold a digest of such a name, keyed by the content of the
data: equal on every machine that has the data, and nothing that others could try names against.
The MD5 in a record is another digest of that content and does not give the key.
`python -m bench data ids` prints which digest stands for which name.
"""

import hashlib
from collections.abc import Collection

DIGITS = 12


def pseudonyms(names: Collection[str], key: bytes) -> dict[str, str]:
    """Name -> hexadecimal digits, different for different names.

    key: up to 64 bytes that only who has the data can compute
    """
    whole = {
        name: hashlib.blake2b(name.encode("utf-8", "surrogateescape"), key=key).hexdigest()
        for name in names
    }
    digits = DIGITS
    while len({digest[:digits] for digest in whole.values()}) < len(whole):
        digits += 1
    return {name: digest[:digits] for name, digest in whole.items()}
