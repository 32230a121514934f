# jlora on the CPU.
#
#     docker build -t jlora .
#     docker run --rm -it -v jlora:/home/jlora jlora demo
#
# The volume keeps what Jittor compiles for the machine's processor (which the machine that builds
# the image may not have), models and runs. Mirrors, for example in China:
#
#     docker build -t jlora --build-arg DEBIAN_MIRROR=mirrors.tuna.tsinghua.edu.cn \
#       --build-arg PIP_INDEX_URL=https://pypi.tuna.tsinghua.edu.cn/simple .
FROM debian:bookworm-slim

ARG DEBIAN_MIRROR=deb.debian.org
RUN sed -i "s/deb.debian.org/$DEBIAN_MIRROR/" /etc/apt/sources.list.d/debian.sources \
 && apt-get update \
 && apt-get install -y --no-install-recommends python3-venv python3-dev g++ \
 && rm -rf /var/lib/apt/lists/*

ARG PIP_INDEX_URL
COPY . /tmp/jlora
RUN python3 -m venv /opt/jlora \
 && /opt/jlora/bin/pip install --no-cache-dir --disable-pip-version-check /tmp/jlora \
 && rm -rf /tmp/jlora

RUN useradd --create-home jlora
USER jlora
WORKDIR /home/jlora
ENV PATH=/opt/jlora/bin:$PATH
ENTRYPOINT ["jlora"]
CMD ["doctor"]
