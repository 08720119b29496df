// The microphone as 16-bit samples in chunks of 40 ms, while the page sets `active`.
const SAMPLES = 960;

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.chunk = new Int16Array(SAMPLES);
    this.used = 0;
    this.active = false;
    this.port.onmessage = ({ data }) => {
      if (this.active && !data.active) this.end();
      this.active = data.active;
    };
  }

  /** Hand over the rest, and say that it was the last. */
  end() {
    if (this.used) this.port.postMessage(this.chunk.slice(0, this.used));
    this.used = 0;
    this.port.postMessage("end");
  }

  process(inputs) {
    const input = inputs[0][0];
    if (!input || !this.active) return true;
    for (const sample of input) {
      this.chunk[this.used++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.used === SAMPLES) {
        this.port.postMessage(this.chunk.slice());
        this.used = 0;
      }
    }
    return true;
  }
}

registerProcessor("capture", Capture);
