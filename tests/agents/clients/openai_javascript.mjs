// The openai package for JavaScript, unmodified: a tool that is called, its result, and a streamed answer.
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey });
const parameters = { type: "object", properties: { a: { enum: [2] }, b: { enum: [3] } }, required: ["a", "b"] };
const common = {
  model: "policy",
  max_tokens: 512,
  stop: ["h", "i", "f", "p", "y", "w", "k"], // none is in a call; a random model would hardly end its answer
  tools: [{ type: "function", function: { name: "add", description: "Adds.", parameters } }],
};
const messages = [{ role: "user", content: "What is 2 + 3?" }];
const reply = await client.chat.completions.create({ ...common, messages, tool_choice: "required" });
const message = reply.choices[0].message;
const { a, b } = JSON.parse(message.tool_calls[0].function.arguments);
if (a !== 2 || b !== 3) throw new Error(JSON.stringify(message));
messages.push(message, { role: "tool", tool_call_id: message.tool_calls[0].id, content: String(a + b) });
let answer = "";
const stream = await client.chat.completions.create({ ...common, messages, tool_choice: "none", stream: true });
for await (const chunk of stream) answer += chunk.choices[0]?.delta?.content ?? "";
console.log(JSON.stringify(answer));
