"""Submits the run of night.toml, with train.jsonl passed as a descriptor. README.md shows it."""

import dbus

bus = dbus.SystemBus()
manager = dbus.Interface(
    bus.get_object("org.finetuned.Finetuned1", "/org/finetuned/Finetuned1"),
    "org.finetuned.Finetuned1.Manager",
)
spec = open("night.toml").read()
files = {"train.jsonl": dbus.types.UnixFd(open("train.jsonl"))}
options = {"spec-name": "night.toml"}
run = manager.Submit(
    spec,
    dbus.Dictionary(files, signature="sh"),
    dbus.Dictionary(options, signature="sv"),
    timeout=24 * 3600,
)
print(run)
