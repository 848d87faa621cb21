# syntax=docker/dockerfile:1

FROM rust:1-bookworm AS build
WORKDIR /src

# The dependencies are built from the manifests alone and empty crates, so that
# this layer stays cached until a Cargo.toml or Cargo.lock changes. A target that a
# manifest names must be there, also one that is not built.
COPY Cargo.toml Cargo.lock ./
COPY crates/emulator/Cargo.toml crates/emulator/
COPY crates/train-classifier/Cargo.toml crates/train-classifier/
RUN for member in . crates/*; do mkdir $member/src && touch $member/src/lib.rs; done \
 && echo 'fn main() {}' > src/main.rs \
 && mkdir benches && touch benches/guard.rs benches/queue.rs \
 && cargo build --release --locked \
 && rm -r src benches crates/*/src

# The copied sources keep their old times, by which cargo would take the empty
# crates for the newer ones: hence the touch.
COPY . .
RUN find src crates -name '*.rs' -exec touch {} + \
 && cargo build --release --locked --bin trainyard

# Debian and not a shell-less image: an image for a command task is made by
# FROM this one and apt-get install of what the command needs.
FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 trainyard \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/trainyard \
      --shell /usr/sbin/nologin trainyard \
 && install -d /etc/trainyard \
 && install -d -o trainyard -g trainyard /var/lib/trainyard
COPY --from=build /src/target/release/trainyard /usr/local/bin/trainyard

# Configuration is mounted at /etc/trainyard and named with --config. Relative
# paths in it, and the default SQLite database, are under the work directory.
WORKDIR /var/lib/trainyard
# By number: Kubernetes can only check that a numeric user is not root.
USER 10001:10001
ENTRYPOINT ["trainyard"]
CMD ["run"]
