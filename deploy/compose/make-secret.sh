#!/bin/sh
# Makes the file `secret.env` beside this one, once: of a new secret the instances that run know
# nothing.
set -eu
cd "$(dirname "$0")"
[ -e secret.env ] && exit 0
umask 077
secret=$(openssl rand -base64 32)
echo "REPLITE_SECRET=$secret" >secret.env.new
mv secret.env.new secret.env
