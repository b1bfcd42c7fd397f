"""Shared memory between processes of one host: regions without names, rings of messages, mailboxes for hidden rows.

All of it relies on x86-64's store order: a plain store of a sequence number is seen after the stores before it.
"""
