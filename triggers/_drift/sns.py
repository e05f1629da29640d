"""Whether the URL in an SNS message may be visited to confirm a subscription: only SNS's own.

The message's signature is not verified, which would take a library for certificates. The sender is
verified by the endpoint's `verify=` (SNS sends the user and password of the endpoint's URL).
"""

import re
from urllib.parse import urlsplit

_AMAZON = re.compile(r"sns\.[a-z0-9-]{1,32}\.amazonaws\.com(\.cn)?")


def may_confirm(url: str, sns: str | None) -> bool:
    """Whether it is `https` at Amazon's SNS, on the default port and without a user; or at `sns`,
    the URL of another SNS.
    """
    try:
        parts = urlsplit(url)
        if sns is not None:
            expected = urlsplit(sns)
            return (parts.scheme, parts.netloc) == (expected.scheme, expected.netloc)
        return (
            parts.scheme == "https"
            and parts.netloc == parts.hostname
            and bool(_AMAZON.fullmatch(parts.netloc))
        )
    except ValueError:
        return False
