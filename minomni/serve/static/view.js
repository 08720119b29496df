// What the page shows: the conversation, the status, waveform and mel, the latency.
import { RATE, toWav } from "/static/audio.js";

// The cuts and names of notebook 12, whose last one ends where audio is made and not yet played.
const PARTS = ["prefill", "first code", "first mel", "first audio, sent and played"];
const MEL_ROWS = 64;
const MEL_STEP = 2; // pixels per drawing
const MEL_TOP = 8000; // Hz
const SLOW_MS = 500; // between drawings for those who prefer little motion
const SPEAKERS = { user: "You: ", model: "Answer: ", error: "Error: " }; // for screen readers

export const $ = (id) => document.getElementById(id);

// ------------------------------------------------------------------------------------ conversation
/** Add an entry to the conversation. `again` is called when its picture is clicked. */
export function addEntry(role, text, picture, again) {
  const entry = document.createElement("li");
  entry.className = role;
  const speaker = document.createElement("b");
  speaker.className = "hidden";
  speaker.textContent = SPEAKERS[role];
  entry.append(speaker);
  if (picture) {
    const image = document.createElement("img");
    image.src = picture;
    image.alt = "Your picture: ask about it again";
    const button = document.createElement("button");
    button.type = "button";
    button.onclick = again;
    button.append(image);
    entry.append(button);
  }
  const words = document.createElement("span");
  words.textContent = text;
  entry.append(words);
  $("log").append(entry);
  scrollDown();
  return entry;
}

export function addWords(entry, words) {
  entry.querySelector("span").textContent += words;
  scrollDown();
}

/** Offer the audio of an answer as a file. */
export function addWav(entry, chunks) {
  const link = document.createElement("a");
  const length = chunks.reduce((sum, chunk) => sum + chunk.length, 0);
  link.href = URL.createObjectURL(toWav(chunks));
  link.download = "answer.wav";
  link.textContent = `keep ${(length / RATE).toFixed(1)} s as wav`;
  const small = document.createElement("small");
  small.append(link);
  entry.append(small);
  scrollDown();
}

function scrollDown() {
  $("log").scrollTop = $("log").scrollHeight;
}

export function status(text) {
  $("status").textContent = text;
}

// ----------------------------------------------------------------------------------------- latency
/** From the end of the question to the first audio, in four parts -> their milliseconds. */
export function showLatency(times, firstMs, pauseMs) {
  const seconds = [times.prefill, times.code - times.prefill, times.mel - times.code];
  const ms = seconds.map((part) => Math.max(0, part * 1000));
  ms.push(Math.max(0, firstMs - ms[0] - ms[1] - ms[2]));
  const total = ms.reduce((sum, part) => sum + part, 0);

  const after = pauseMs ? ` after the pause of ${pauseMs} ms that ends your turn` : "";
  $("latency").replaceChildren(`${Math.round(total)} ms${after}: `);
  const bars = $("bar").children;
  ms.forEach((part, i) => {
    bars[i].style.width = `${(100 * part) / total}%`;
    const label = document.createElement("span");
    label.className = `part${i + 1}`;
    label.textContent = `${PARTS[i]} ${Math.round(part)}`;
    $("latency").append(label);
  });
  return ms;
}

// --------------------------------------------------------------------------------- waveform and mel
const toMel = (hz) => 2595 * Math.log10(1 + hz / 700);
const toHz = (mel) => 700 * (10 ** (mel / 2595) - 1);

/** Draw what an AnalyserNode hears, again and again. */
export function draw(analyser) {
  drawWave(analyser);
  drawMel(analyser);
  const again = () => draw(analyser);
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) setTimeout(again, SLOW_MS);
  else requestAnimationFrame(again);
}

function drawWave(analyser) {
  const wave = $("wave").getContext("2d");
  const { width, height } = wave.canvas;
  const samples = new Float32Array(analyser.fftSize);
  analyser.getFloatTimeDomainData(samples);
  wave.clearRect(0, 0, width, height);
  wave.strokeStyle = getComputedStyle(document.body).color;
  wave.beginPath();
  samples.forEach((sample, i) => {
    wave.lineTo((i * width) / samples.length, height / 2 - sample * height * 0.9);
  });
  wave.stroke();
}

function drawMel(analyser) {
  const mel = $("mel").getContext("2d");
  const { width, height } = mel.canvas;
  const levels = new Float32Array(analyser.frequencyBinCount);
  analyser.getFloatFrequencyData(levels);
  mel.drawImage(mel.canvas, -MEL_STEP, 0);
  const size = height / MEL_ROWS;
  for (let row = 0; row < MEL_ROWS; row++) {
    const hz = toHz((toMel(MEL_TOP) * (row + 0.5)) / MEL_ROWS);
    const level = levels[Math.round((hz * analyser.fftSize) / RATE)];
    const light = Math.max(0, Math.min(1, (level + 100) / 70));
    mel.fillStyle = `hsl(${260 - 220 * light} 75% ${8 + 60 * light}%)`;
    mel.fillRect(width - MEL_STEP, height - (row + 1) * size, MEL_STEP, size + 1);
  }
}
