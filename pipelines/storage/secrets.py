"""Credentials that stand in URIs: what is stored, logged or printed has none."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

HIDDEN = "..."

# In Azure's addresses, what stands before the @ is the container.
_USER_AND_PASSWORD = re.compile(r"(?<=://)(?<!abfs://)(?<!abfss://)(?<!wasb://)(?<!wasbs://)[^/\s@]+@")
_WITH_QUERY = ("http://", "https://")
_SECRET_IN_QUERY = re.compile(
    r"([?&][\w.-]*(?:sig|token|secret|password|credential|key)[\w.-]*=)[^&\s\"']+", re.IGNORECASE
)
# What signing adds to a URL, by S3, Google Cloud Storage, CloudFront and Azure, and the usual names of tokens. The
# parameters of a signature that are no secrets go too: they are others whenever the same object is signed again.
_OF_SIGNATURES = re.compile(
    r"x-(?:amz|goog|oss|cos)-.*|q-.*|signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy|security-token"
    r"|.*(?:token|secret|password|passwd|credential|api_?key|access_?key|signature)",
    re.IGNORECASE,
)
_OF_AZURE = re.compile(r"s[vstrpiek]|ss|srt|sip|spr|sig|skoid|sktid|skt|ske|sks|skv|saoid|suoid|scid")


def without_credentials(uri: str) -> str:
    """A URI without user, password and what signing adds to it; all else stays, so that it names the same object."""
    if "://" not in uri:
        return uri
    uri = _USER_AND_PASSWORD.sub("", uri, count=1)
    if not uri.startswith(_WITH_QUERY):
        # a question mark is part of the name of an object in a bucket
        return uri
    address, asked, query = uri.partition("?")
    if not asked:
        return uri
    query, hash_, fragment = query.partition("#")
    parameters = query.split("&")
    names = {unquote(parameter.partition("=")[0]) for parameter in parameters}
    signed_by_azure = {"sig", "sv"} <= names
    kept = [
        parameter
        for parameter in parameters
        if not _OF_SIGNATURES.fullmatch(name := unquote(parameter.partition("=")[0]))
        and not (signed_by_azure and _OF_AZURE.fullmatch(name))
    ]
    return address + ("?" + "&".join(kept) if kept else "") + hash_ + fragment


def hidden(text: str) -> str:
    """A text in which the credentials of URIs are replaced by HIDDEN."""
    return _SECRET_IN_QUERY.sub(rf"\1{HIDDEN}", _USER_AND_PASSWORD.sub(f"{HIDDEN}@", text))


def hidden_in(value: Any) -> Any:
    """Plain data, as JSON has it, with all texts as `hidden` gives them."""
    if isinstance(value, dict):
        return {key: hidden_in(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [hidden_in(one) for one in value]
    return hidden(value) if isinstance(value, str) else value
