"""Credentials of URIs and of storage options: what is stored, logged or printed has none."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "..."
SHORTEST_SECRET_CHARACTERS = 4
# A shorter one is hidden where it stands alone: it may be a part of words, and of the names of buckets.
SHORTEST_SECRET_WITHIN_WORDS_CHARACTERS = 8
# An option with another name has a secret all the same where its value is as long as keys are.
SHORTEST_KEY_CHARACTERS = 16

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


_HARMLESS_OPTION = re.compile(r"endpoint|region|account_name|project|profile|anon|version|style", re.IGNORECASE)
_SECRET_OPTION = re.compile(r"key|secret|token|pass|pwd|cred|auth|sas|sig|connection_string", re.IGNORECASE)
# Ways of signing in, which gcsfs takes in place of a token.
_NO_TOKENS = ("anon", "browser", "cache", "cloud", "google_default")
_STORAGE_OVERRIDE = re.compile(r"\b(storage\w*\.([\w.]+)=)[^\s'\"]+")
_known: set[str] = set()


def remember(options: Mapping[str, Any]) -> None:
    """Let no text that `hidden` gives show the secrets among storage options, nested ones included."""
    for value in _secrets_in(options):
        _known.update((value, quote(value, safe="")))


def _secrets_in(options: Mapping[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets_in(value)
        elif isinstance(value, str) and value not in _NO_TOKENS and not _HARMLESS_OPTION.search(str(key)):
            named = _SECRET_OPTION.search(str(key)) is not None
            if len(value) >= (SHORTEST_SECRET_CHARACTERS if named else SHORTEST_KEY_CHARACTERS):
                yield value


def hidden(text: str) -> str:
    """A text in which HIDDEN stands for the credentials of URIs, and for the secrets of storage options."""
    for secret in sorted(_known, key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET_WITHIN_WORDS_CHARACTERS:
            text = text.replace(secret, HIDDEN)
        elif secret in text:
            text = re.sub(rf"(?<![\w./-]){re.escape(secret)}(?![\w/-])", HIDDEN, text)
    # one that was refused before anything could be remembered
    text = _STORAGE_OVERRIDE.sub(_hidden_override, text)
    return _SECRET_IN_QUERY.sub(rf"\1{HIDDEN}", _USER_AND_PASSWORD.sub(f"{HIDDEN}@", text))


def _hidden_override(found: re.Match[str]) -> str:
    return found[0] if _HARMLESS_OPTION.search(found[2]) else found[1] + HIDDEN


def hidden_in(value: Any) -> Any:
    """Plain data, or what a job says of itself, with all texts as `hidden` gives them."""
    if isinstance(value, Mapping):
        return {hidden_in(key): hidden_in(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [hidden_in(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        shown = copy.copy(value)
        vars(shown).update(hidden_in(vars(value)))
        return shown
    return hidden(value) if isinstance(value, str) else value
