"""Whether a URL that a message brings may be visited to confirm an SNS subscription: only SNS's
own.

The message's signature is not verified: that takes a library for certificates. What proves the
sender is the endpoint's `verify=` (SNS sends the user and password of the endpoint's URL), and what
is visited is only what this page lets through.
"""

import re
from urllib.parse import urlsplit

_AMAZON = re.compile(r"sns\.[a-z0-9-]{1,32}\.amazonaws\.com(\.cn)?")


def may_confirm(url: str, sns: str | None) -> bool:
    """Whether it is `https` at Amazon's SNS, on the usual port and without a user; or at `sns`, an
    SNS of somebody's own.
    """
    try:
        asked = urlsplit(url)
        if sns is not None:
            own = urlsplit(sns)
            return (asked.scheme, asked.netloc) == (own.scheme, own.netloc)
        return (
            asked.scheme == "https"
            and asked.netloc == asked.hostname
            and bool(_AMAZON.fullmatch(asked.netloc))
        )
    except ValueError:
        return False
