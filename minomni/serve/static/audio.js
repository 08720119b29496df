// Microphone and loudspeaker: two worklets at 24 kHz, and conversions of their samples.
export const RATE = 24000; // Hz, of both directions
const WAV_HEAD = 44; // bytes
const RESUME_MS = 10_000; // that a browser may take to begin with audio

export class Player {
  /** Plays answers; `onmessage` gets what playback.js reports. */
  static async open(onmessage) {
    const context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
    await context.audioWorklet.addModule("/static/playback.js");
    const player = new Player();
    player.context = context;
    player.node = new AudioWorkletNode(context, "playback", { outputChannelCount: [1] });
    player.node.port.onmessage = ({ data }) => onmessage(data);
    player.analyser = new AnalyserNode(context, { fftSize: 1024, smoothingTimeConstant: 0.3 });
    player.node.connect(context.destination);
    player.node.connect(player.analyser);
    return player;
  }

  /** Whether audio is played. Without an audio device some browsers neither begin nor say so. */
  get running() {
    return this.context.state === "running";
  }

  /** Begin to play, or go on; an error where the browser does not within this time. */
  async resume(patienceMs = RESUME_MS) {
    const late = new Promise((_, reject) => {
      setTimeout(() => reject(new Error("the browser starts no audio")), patienceMs);
    });
    await Promise.race([this.context.resume(), late]);
  }

  send(message) {
    this.node.port.postMessage(message);
  }
}

export class Microphone {
  /** Asks for the microphone; `onchunk` gets its samples as base64 while it listens. */
  static async open(player, onchunk) {
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: true, noiseSuppression: true },
    });
    const { context } = player;
    await context.audioWorklet.addModule("/static/capture.js");
    const microphone = new Microphone();
    microphone.listening = false;
    microphone.node = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
    microphone.node.port.onmessage = ({ data }) => {
      if (data === "end") microphone.ended();
      else onchunk(toBase64(data));
    };
    const source = context.createMediaStreamSource(stream);
    source.connect(microphone.node);
    source.connect(player.analyser);
    return microphone;
  }

  begin() {
    this.listening = true;
    this.node.port.postMessage({ active: true });
  }

  /** Stop listening; `then` is called when the last samples have been handed over. */
  end(then) {
    if (!this.listening) return;
    this.listening = false;
    this.then = then;
    this.node.port.postMessage({ active: false });
  }

  ended() {
    const { then } = this;
    this.then = null;
    then?.();
  }
}

export function toBase64(samples) {
  const bytes = new Uint8Array(samples.buffer);
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

/** 16-bit samples in base64 -> numbers from -1 to 1. */
export function toFloats(base64) {
  const text = atob(base64);
  const samples = new Float32Array(text.length / 2);
  for (let i = 0; i < samples.length; i++) {
    const value = text.charCodeAt(2 * i) | (text.charCodeAt(2 * i + 1) << 8);
    samples[i] = (value > 32767 ? value - 65536 : value) / 32768;
  }
  return samples;
}

/** Chunks of samples as a wav file. */
export function toWav(chunks) {
  const length = chunks.reduce((sum, chunk) => sum + chunk.length, 0);
  const view = new DataView(new ArrayBuffer(WAV_HEAD + 2 * length));
  const word = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  word(0, "RIFF");
  view.setUint32(4, WAV_HEAD - 8 + 2 * length, true);
  word(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // one channel
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  word(36, "data");
  view.setUint32(40, 2 * length, true);
  let at = WAV_HEAD;
  for (const chunk of chunks) {
    for (const sample of chunk) {
      view.setInt16(at, Math.max(-32768, Math.min(32767, Math.round(sample * 32768))), true);
      at += 2;
    }
  }
  return new Blob([view], { type: "audio/wav" });
}
