// Plays chunks one after the other without gaps, and counts what was played of the answer.
const START = 1920; // samples that wait before the first one is played: 80 ms

class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.reset(null);
    this.port.onmessage = ({ data }) => this.handle(data);
  }

  reset(item) {
    this.item = item;
    this.chunks = [];
    this.offset = 0; // in the first chunk
    this.waiting = 0; // samples
    this.played = 0; // samples
    this.gaps = 0;
    this.started = false;
    this.complete = false;
  }

  handle(data) {
    if (data.kind === "begin") this.reset(data.item);
    if (data.kind === "stop") {
      this.port.postMessage({ kind: "stopped", item: this.item, played: this.played });
      this.reset(null);
    }
    if (data.item !== this.item) return; // of an answer that was interrupted
    if (data.kind === "chunk") {
      this.chunks.push(data.samples);
      this.waiting += data.samples.length;
    }
    if (data.kind === "complete") this.complete = true;
  }

  process(inputs, outputs) {
    const output = outputs[0][0];
    if (!this.started) {
      const ready = this.waiting >= START || (this.complete && this.waiting > 0);
      if (!ready) return true;
      this.started = true;
      this.port.postMessage({ kind: "first", item: this.item });
    }
    let filled = 0;
    while (filled < output.length && this.chunks.length) {
      const chunk = this.chunks[0];
      const count = Math.min(chunk.length - this.offset, output.length - filled);
      output.set(chunk.subarray(this.offset, this.offset + count), filled);
      filled += count;
      this.offset += count;
      if (this.offset === chunk.length) {
        this.chunks.shift();
        this.offset = 0;
      }
    }
    this.played += filled;
    this.waiting -= filled;
    if (filled < output.length && this.item !== null) {
      if (this.complete) {
        const { item, played, gaps } = this;
        this.port.postMessage({ kind: "ended", item, played, gaps });
        this.reset(null);
      } else {
        this.gaps += 1;
      }
    }
    return true;
  }
}

registerProcessor("playback", Playback);
