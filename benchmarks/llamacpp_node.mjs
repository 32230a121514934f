// Greedy search and sampling by llama.cpp in node-llama-cpp's binaries, which have code for every
// kind of processor; xllamacpp's wheel has AVX2 at most. A side as benchmarks/sides.py has it:
//   node llamacpp_node.mjs FOLDER_WITH_NODE_MODULES SPEC

import fs from "node:fs";
import readline from "node:readline";

const [folder, text] = process.argv.slice(2);
const spec = JSON.parse(text);
const {getLlama} = await import(`${folder}/node_modules/node-llama-cpp/dist/index.js`);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: spec.threads});
const model = await llama.loadModel({modelPath: spec.model});
const context = await model.createContext({
    sequences: spec.most, contextSize: spec.context, threads: spec.threads, batchSize: 512
});
const sequences = Array.from({length: spec.most}, () => context.getSequence());
const prompts = JSON.parse(fs.readFileSync(spec.prompts, "utf8"));
const begun = performance.now();

async function answer(sequence, prompt, tokens, temperature) {
    await sequence.clearHistory();
    const found = [];
    const options = {temperature, topK: 0, topP: 1, minP: 0, yieldEogToken: true};
    for await (const token of sequence.evaluate(prompt, options)) {
        found.push(token);
        if (found.length === tokens) break;
    }
    return found;
}

async function round({streams, tokens, temperature}) {
    const texts = await Promise.all(
        prompts.slice(0, streams).map((p, i) => answer(sequences[i], p, tokens, temperature))
    );
    // Before the first end, as benchmarks/prompts.py has it.
    const cut = texts.map((t) => {
        const end = t.findIndex((token) => spec.ends.includes(token));
        return end < 0 ? t : t.slice(0, end);
    });
    if (texts.some((t) => t.length !== tokens)) throw new Error("a text is too short");
    return {
        inputs: streams, tokens: cut.reduce((sum, t) => sum + t.length, 0),
        answers: Object.fromEntries(cut.map((t, i) => [i, t])),
        "computes in": `llama.cpp ${llama.llamaCppRelease.release}`,
    };
}

function usedAvx512() {
    const seconds = performance.now() - begun;
    let found = null;
    for (const task of fs.readdirSync("/proc/self/task")) {
        try {
            const state = fs.readFileSync(`/proc/self/task/${task}/arch_status`, "utf8");
            const elapsed = Number(state.match(/AVX512_elapsed_ms:\s*(-?\d+)/)[1]);
            found = found || (elapsed >= 0 && elapsed < seconds);
        } catch {} // the thread has ended
    }
    return found;
}

// The largest resident memory of this process alone, see `peak_mb` of sides.py.
function peakMb() {
    return Number(fs.readFileSync("/proc/self/status", "utf8").match(/VmHWM:\s*(\d+) kB/)[1]) / 1024;
}

for await (const line of readline.createInterface({input: process.stdin})) {
    const [, command, args] = line.match(/^(\w+) ?(.*)$/);
    let said = {};
    if (command === "round") {
        const started = performance.now();
        const extra = await round(JSON.parse(args || "{}"));
        said = {
            seconds: (performance.now() - started) / 1000,
            peak_mb: peakMb(),
            extra: {...extra, avx512: usedAvx512()},
        };
    }
    console.log(JSON.stringify(said));
}
process.exit(0);
