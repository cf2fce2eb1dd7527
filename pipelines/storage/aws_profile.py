"""What AWS's configuration files say, as options for delta-rs, which by itself reads less of them than s3fs does.

It takes the credentials of AWS_PROFILE only where no endpoint is named (or an option forces it), never the profile's
endpoint, and no other profile than that one.
"""

from __future__ import annotations

import os
from typing import Any


def profile_options(profile: str | None) -> dict[str, str]:
    """delta-rs's options for S3 where no key is given.

    profile: storage.options.profile; None is that of AWS_PROFILE, else the default one. Where botocore (which s3fs
    brings) is not installed, or there is no such profile, nothing is read of the files: s3fs reports it.
    """
    result: dict[str, str] = {}
    if "AWS_ACCESS_KEY_ID" not in os.environ or profile:
        # The credentials of AWS_PROFILE are then used for endpoints other than AWS's own, too.
        result["AWS_FORCE_CREDENTIAL_LOAD"] = "true"
    try:
        from botocore.exceptions import BotoCoreError
        from botocore.session import Session
    except ImportError:
        return result
    try:
        session = Session(profile=profile)
        settings = session.get_scoped_config()
        result |= _credentials(session) if profile else {}
    except BotoCoreError:
        return result
    # A malformed line of the file makes this text.
    own = session.full_config.get("services", {}).get(settings.get("services"), {}).get("s3")
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or (own.get("endpoint_url") if isinstance(own, dict) else None)
        or settings.get("endpoint_url")
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or settings.get("region")
    found = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": region}
    return result | {name: value for name, value in found.items() if value}


def _credentials(session: Any) -> dict[str, str]:
    """The keys of a profile, which delta-rs cannot look up by its name. They are those of this moment: some expire."""
    credentials = session.get_credentials()
    if credentials is None:
        return {}
    now = credentials.get_frozen_credentials()
    found = {
        "AWS_ACCESS_KEY_ID": now.access_key,
        "AWS_SECRET_ACCESS_KEY": now.secret_key,
        "AWS_SESSION_TOKEN": now.token,
    }
    return {name: value for name, value in found.items() if value}
