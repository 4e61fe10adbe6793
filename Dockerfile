# syntax=docker/dockerfile:1
# The image of ecr-cname, for linux/amd64 and linux/arm64:
#
#     docker buildx build --platform linux/amd64,linux/arm64 --tag REGISTRY/ecr-cname:VERSION .
#
# Everything is compiled on the machine that builds, for whatever platform is asked; nothing is emulated.

# What the binary is built with: the toolchain of Cargo.toml's rust-version, and a C compiler for the other target beside its own.
FROM --platform=$BUILDPLATFORM rust:1.95.0-slim-trixie@sha256:e14e87345b4d5964ddcc3491d27ee046a0f23820f340c3c1e24da6880141f7c0 AS toolchain
ARG BUILDARCH
# Debian keeps only the newest version of a package, so a pinned one would soon not build.
# hadolint ignore=DL3008,SC2086
RUN if [ "$BUILDARCH" = arm64 ]; then cross="gcc-x86-64-linux-gnu libc6-dev-amd64-cross"; \
    else cross="gcc-aarch64-linux-gnu libc6-dev-arm64-cross"; fi \
 && apt-get update \
 && apt-get install --yes --no-install-recommends $cross \
 && rm -rf /var/lib/apt/lists/*
RUN rustup target add x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu \
 && cargo install --locked cargo-chef@0.1.78 cargo-auditable@0.7.7
ENV CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER=x86_64-linux-gnu-gcc \
    CC_x86_64_unknown_linux_gnu=x86_64-linux-gnu-gcc \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
WORKDIR /src

# The dependencies as a recipe, which changes only when they do.
FROM toolchain AS recipe
COPY . .
RUN cargo chef prepare --bin ecr-cname --recipe-path recipe.json

FROM toolchain AS build
ARG TARGETARCH
RUN case "$TARGETARCH" in \
      amd64) echo x86_64-unknown-linux-gnu ;; \
      arm64) echo aarch64-unknown-linux-gnu ;; \
      *) echo "no build for the architecture '$TARGETARCH': amd64 and arm64 are supported" >&2; exit 1 ;; \
    esac >/target
COPY --from=recipe /src/recipe.json recipe.json
# A layer of its own: compiled once for as long as the recipe stays the same.
RUN cargo chef cook --release --locked --bin ecr-cname --target "$(cat /target)" --recipe-path recipe.json
COPY . .
# The list of crates goes into the binary (cargo-auditable), where scanners and SBOM tools find it.
RUN cargo auditable build --release --locked --bin ecr-cname --target "$(cat /target)" \
 && install -D "target/$(cat /target)/release/ecr-cname" /out/usr/local/bin/ecr-cname

# glibc, CA certificates and a user who is not root; no shell, no package manager.
FROM gcr.io/distroless/cc-debian13:nonroot@sha256:54df941ed0d06a1bd95ef5e0ce391fd8d9f94b64782dc9a60062727849ee3f97
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ecr-cname" \
      org.opencontainers.image.description="Your own name for your ECR registry, everywhere in a Kubernetes cluster" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="gcr.io/distroless/cc-debian13:nonroot"
COPY --from=build /out/ /
# By number, so that Kubernetes can see that it is not root (runAsNonRoot).
USER 65532:65532
EXPOSE 8443 9090
ENTRYPOINT ["/usr/local/bin/ecr-cname"]
