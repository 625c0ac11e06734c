#!/bin/sh
# Says where this Machine is, and becomes the application, which gets the signals then.
set -eu
name=$FLY_MACHINE_ID.vm.$FLY_APP_NAME.internal
export REPLITE_ADVERTISE="http://$name:8080"
export REPLITE_ADVERTISE_REPLICATION="replite://$name:7000"
export REPLITE_LABELS="machine=$FLY_MACHINE_ID,region=$FLY_REGION"
exec "${APP:-/usr/local/bin/app}" "[::]:8080"
